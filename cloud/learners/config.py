"""How a learner learns: one set of options, and named presets of it.

A preset is a learner, by name: :data:`DEFAULT` is what the cloud uses, and ``sdft-paper`` the
paper's recipe (Shenfeld et al., arXiv 2601.19897).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, get_args

from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

Method = Literal["sdft", "sft"]
Divergence = Literal["forward", "reverse", "js"]
Teacher = Literal["imported", "frozen", "ema", "current"]
Rollouts = Literal["guided", "on-policy", "demonstration"]
Schedule = Literal["plateau", "cosine"]
Fallback = Literal["sft", "stop", "ignore"]
Prompt = Literal["turns", "prose"]
Precision = Literal["auto", "fp32", "bf16"]


_TINY = 1e-12
_RANGES = {
    (1, math.inf, "at least 1"): ("steps", "batch", "row_tokens", "cap", "shown", "anchor_tokens"),
    (_TINY, math.inf, "it is above 0"): (
        *("learning_rate", "temperature", "sharpness", "clip", "alpha"),
    ),
    (_TINY, 1 - _TINY, "it lies between 0 and 1"): ("js_beta",),
    (0, 1, "between 0 and 1"): ("guidance", "ema_rate", "proximal", "hint"),
    (0, math.inf, "it is not negative"): (
        *("top_k", "skip", "rank", "anchor_batch", "replay_batch", "anchor_weight"),
        *("replay_weight", "base_weight", "ewc", "budget_seconds", "weight_decay"),
        *("warmup", "checkpoint_seconds"),
    ),
}


@dataclass(frozen=True)
class LearnerConfig:
    """Options of one job of learning; unchanged they are the preset ``sdft`` (docs/learning.md).

    What is learnt from a demonstration:

    - ``method``: ``sdft`` pulls the student to a teacher that was shown the demonstration; ``sft``
      is cross-entropy on the demonstration's answer.
    - ``divergence``: forward KL(teacher||student), reverse, or generalized Jensen-Shannon with
      ``js_beta`` the teacher's part of the mixture.
    - ``top_k``: the teacher's most likely tokens kept, with one bucket for the rest; 0 is the full
      vocabulary.
    - ``teacher``: the model as it was ``imported``, the student ``frozen`` as the job found it, an
      ``ema`` of the student with ``ema_rate`` a step, or the ``current`` student.
    - ``teacher_prompt``: the demonstration as earlier ``turns`` of the chat, ``shown`` times, or in
      the paper's ``prose``.
    - ``sharpness``: power of the teacher's probabilities before they are renormalised; above 1 it
      is surer than it says.
    - ``rollouts``: answers that are scored: ``guided`` walks (a proposal stands from ``guidance``
      of the teacher's best probability on), ``on-policy`` samples at ``temperature`` of at most
      ``cap`` tokens, or the ``demonstration`` itself.
    - ``skip``: first tokens of an answer that are not scored. ``mask_truncated``: an on-policy
      sample that reached ``cap`` without an end counts for nothing.
    - ``proximal``: the target is the nearest to the student with a share of what the teacher knows
      more; the share rises from this to 1, and 1 is off (iSDFT). ``base_weight``: weight of
      KL(base||student) on the lessons.
    - ``hint``: weight (0..1) of cross-entropy on the demonstration at the start and at the end; the
      teacher has the rest.
    - ``fallback``: what to do where the teacher is not clearly better than the student: learn by
      ``sft``, ``stop``, or ``ignore``.

    What may change: ``layers`` are shares of the depth (0.5, 1.0: the upper half), ``embeddings``
    trains them too (from layer 0 on only), ``rank`` above 0 trains low-rank adapters that are
    merged into the weights, scaled by ``alpha / rank``.

    Against forgetting: ``anchor_weight`` and ``anchor_batch`` (the base's own answers, the first
    ``anchor_tokens`` of each), ``replay_weight`` and ``replay_batch`` (earlier demonstrations as
    the release before said them), ``ewc`` (elastic weight consolidation's lambda).

    Optimisation: AdamW with decoupled ``weight_decay``, ``steps`` of ``batch`` lessons; the
    ``learning_rate`` is reached in ``warmup`` steps and follows ``schedule`` (``plateau`` then a
    linear last third, or ``cosine``); gradients are clipped to a norm of ``clip``. ``seed`` decides
    draws, samples and adapters. ``budget_seconds`` 0 is none; else the schedule follows the clock
    and ends in time. ``checkpoint_seconds`` lie at least between two checkpoints.
    ``row_tokens`` bounds memory: so many tokens are computed at once (or one sequence, where it is
    longer), what they share laid once.
    ``precision`` is that of matrix products: ``fp32``, ``bf16``, or ``auto``: bfloat16 where the
    processor multiplies it by itself (:mod:`cloud.learners.precision`).
    """

    method: Method = "sdft"
    divergence: Divergence = "forward"
    js_beta: float = 0.5
    top_k: int = 32
    teacher: Teacher = "imported"
    ema_rate: float = 0.01
    teacher_prompt: Prompt = "turns"
    shown: int = 2
    sharpness: float = 3.0
    rollouts: Rollouts = "guided"
    guidance: float = 0.1
    temperature: float = 1.0
    cap: int = 128
    skip: int = 0
    mask_truncated: bool = True
    proximal: float = 1.0
    base_weight: float = 0.0
    hint: tuple[float, float] = (1.0, 0.5)
    fallback: Fallback = "sft"

    layers: tuple[float, float] = (0.5, 1.0)
    embeddings: bool = False
    rank: int = 0
    alpha: float = 16.0

    anchor_weight: float = 1.0
    anchor_batch: int = 8
    anchor_tokens: int = 24
    replay_weight: float = 1.0
    replay_batch: int = 8
    ewc: float = 0.0

    steps: int = 75
    batch: int = 8
    learning_rate: float = 1.2e-4
    warmup: int = 5
    schedule: Schedule = "plateau"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    budget_seconds: float = 0.0
    checkpoint_seconds: float = 60.0
    row_tokens: int = 640
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            InvalidInputError: an option has an unknown value, or two do not go together.
        """
        kinds = {
            "method": Method,
            "divergence": Divergence,
            "teacher": Teacher,
            "teacher_prompt": Prompt,
            "rollouts": Rollouts,
            "fallback": Fallback,
            "schedule": Schedule,
            "precision": Precision,
        }
        for name, kind in kinds.items():
            if (value := getattr(self, name)) not in get_args(kind):
                _refuse(f"{name} is {value!r}: choose from {', '.join(get_args(kind))}")
        self._check_ranges()
        first, last = self.layers
        if not 0 <= first < last <= 1:
            _refuse(f"layers are {first}:{last}: shares of the depth, such as 0.5:1.0")
        if self.embeddings and (first > 0 or self.rank):
            _refuse("embeddings train only with all layers (0.0:1.0) and without a rank")
        if self.rollouts == "on-policy" and any(self.hint):
            _refuse("a hint needs rollouts along the demonstration: guided or demonstration")
        if self.rollouts == "on-policy" and self.base_weight:
            _refuse("base_weight needs rollouts along the demonstration: guided or demonstration")

    def _check_ranges(self) -> None:
        for (low, high, words), names in _RANGES.items():
            for name in names:
                value = getattr(self, name)
                parts = value if isinstance(value, tuple) else (value,)
                if not all(low <= part <= high and math.isfinite(part) for part in parts):
                    _refuse(f"{name} is {value}: {words}")

    @classmethod
    def named(cls, name: str, **changes: Any) -> Self:  # noqa: ANN401  # any field's type
        """A preset, with changes.

        >>> LearnerConfig.named("sft", steps=3).steps
        3

        Raises:
            InvalidInputError: there is no such preset or option.
        """
        if name not in PRESETS:
            _refuse(f"no learner is named {name!r}: choose from {', '.join(PRESETS)}")
        if unknown := set(changes) - {f.name for f in fields(cls)}:
            _refuse(f"a learner has no option {', '.join(sorted(unknown))}")
        return cls(**(PRESETS[name] | changes))

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Options as ``json`` wrote ``dataclasses.asdict`` of them."""
        return cls(**(raw | {n: tuple(raw[n]) for n in ("layers", "hint") if n in raw}))

    @property
    def most_lessons(self) -> int:
        """As many demonstrations as the steps draw twice: with more, some would hardly be seen."""
        return max(1, self.steps * self.batch // 2)

    @property
    def scored_once(self) -> bool:
        """Whether the teacher's word on a lesson stays what it is and is small enough to keep."""
        fixed = self.teacher in {"imported", "frozen"} and self.rollouts != "on-policy"
        return fixed and self.top_k > 0


def read_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Options from words, ``name=value``: values are JSON, or plain text.

    >>> read_options(["rank=8", "layers=[0.0, 1.0]", "fallback=stop"])
    {'rank': 8, 'layers': (0.0, 1.0), 'fallback': 'stop'}

    Raises:
        InvalidInputError: no such option, or a value of another kind.
    """
    defaults, given = asdict(LearnerConfig()), {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in defaults:
            _refuse(f"a learner has no option {name!r}: choose from {', '.join(sorted(defaults))}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        given[name] = tuple(value) if isinstance(value, list) else value
        if not _alike(given[name], defaults[name]):
            like = json.dumps(defaults[name]).strip('"')
            _refuse(f"{pair}: a value of another kind is wanted, such as {name}={like}")
    return given


def _alike(value: object, default: object) -> bool:
    """Whether a value is of its option's kind; whole numbers are fractions, too."""
    if isinstance(default, tuple):
        return (
            isinstance(value, tuple)
            and len(value) == len(default)
            and all(_alike(v, d) for v, d in zip(value, default, strict=True))
        )
    return type(value) is type(default) or (isinstance(default, float) and type(value) is int)


def _refuse(why: str) -> NoReturn:
    raise InvalidInputError(why)


DEFAULT = "sft-anchored"
"""The learner of a cloud that is not told another: not told apart from SDFT by what was measured,
and it asks no teacher (docs/adr/0018)."""

_ALONE: dict[str, Any] = {"anchor_batch": 0, "replay_batch": 0}

PRESETS: dict[str, dict[str, Any]] = {
    "sdft": {},
    "sft": {"method": "sft", **_ALONE},
    "sft-replay": {"method": "sft", "anchor_batch": 0},
    "sft-anchored": {"method": "sft"},
    "lora": {"method": "sft", "rank": 16, "learning_rate": 5e-4, **_ALONE},
    "ewc": {"method": "sft", "ewc": 1000.0, **_ALONE},
    "isdft": {"proximal": 0.25, "base_weight": 2e-3, "sharpness": 1.0, "hint": (0.0, 0.0)},
    "sdft-paper": {
        "sharpness": 1.0,
        "hint": (0.0, 0.0),
        "divergence": "forward",
        "top_k": 0,
        "teacher": "ema",
        "ema_rate": 0.01,
        "teacher_prompt": "prose",
        "rollouts": "on-policy",
        "temperature": 1.0,
        "cap": 1024,
        "mask_truncated": False,
        "skip": 3,
        "layers": (0.0, 1.0),
        "embeddings": True,
        "schedule": "cosine",
        "learning_rate": 2e-5,
        "batch": 32,
        "warmup": 10,
        "fallback": "ignore",
        **_ALONE,
    },
}
"""Learners by name, as what differs from ``LearnerConfig()``, which is ``sdft``."""
