"""Judge a candidate on the very file that devices would run, through their own runtime.

Three questions: how many held-out demonstrations does it answer exactly; how many of the earlier
releases' held-out ones does it still answer; how far has it moved from the base model's own answers
to general prompts (mean KL(base || candidate) a token, in nats).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from cloud.learners.prompts import SYSTEM
from edge.student.runtime import Student, greedy
from protos.prompt import Message, Shown, chat, render

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt


_CHANCE = 2


@dataclass(frozen=True)
class GateConfig:
    """Bounds a candidate must keep.

    ``new_share`` (0..1) of held-out demonstrations answered exactly, and ``new_gain`` more than the
    student in service; ``earlier_loss`` the share of earlier ones that may be lost against it (two
    always may); ``base_kl`` in nats a token.
    """

    new_share: float = 0.5
    new_gain: float = 0.05
    earlier_loss: float = 0.05
    base_kl: float = 0.2
    threads: int = 2


@dataclass(frozen=True)
class Check:
    """One measured value against its bound; ``passed`` says on which side it lies."""

    name: str
    value: float
    bound: float
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """The gate's word: all checks, and what the candidate said to each held-out demonstration."""

    checks: tuple[Check, ...]
    answers: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(c.passed for c in self.checks)

    def to_json(self) -> list[dict[str, object]]:
        """The checks for ``result.json``."""
        return [asdict(c) for c in self.checks]


@dataclass(frozen=True)
class Scores:
    """What one student scored: shares answered exactly (None: nothing to ask), and its answers.

    ``earlier_asked`` is of how many ``earlier`` is the share.
    """

    new: float
    earlier: float | None
    answers: tuple[str, ...]
    earlier_asked: int = 0


def judge(current: Scores, candidate: Scores, base_kl: float, config: GateConfig) -> Verdict:
    """Compare the candidate with the student in service: the pure part of the gate.

    >>> now, then = Scores(0.0, 0.8, ()), Scores(0.7, 0.78, ())
    >>> judge(now, then, 0.02, GateConfig()).passed
    True
    >>> judge(now, Scores(0.7, 0.6, ()), 0.02, GateConfig()).passed
    False
    """
    bound = max(config.new_share, min(1.0, current.new + config.new_gain))
    checks = [Check("new", candidate.new, bound, candidate.new >= bound)]
    if current.earlier is not None and candidate.earlier is not None:
        # Of few, two answers more or less are chance.
        least = _CHANCE / candidate.earlier_asked if candidate.earlier_asked else 0.0
        bound = current.earlier - max(config.earlier_loss, least)
        checks.append(Check("earlier", candidate.earlier, bound, candidate.earlier >= bound - 1e-9))
    checks.append(Check("base_kl", base_kl, config.base_kl, base_kl <= config.base_kl))
    return Verdict(tuple(checks), candidate.answers)


def score(student: Student, new: Sequence[Shown], earlier: Sequence[Shown]) -> Scores:
    """Ask a student all held-out demonstrations, greedily and without working memory."""
    asked = [*new, *earlier]
    chats = [chat(student.harness.system, d.messages) for d in asked]
    decoding = greedy(student.harness)
    answers = student.answer_all(chats, decoding.max_tokens, decoding.grammar)
    texts = tuple(a.text for a in answers)
    right = [t == d.answer for t, d in zip(texts, asked, strict=True)]
    return Scores(
        new=sum(right[: len(new)]) / len(new) if new else 0.0,
        earlier=sum(right[len(new) :]) / len(earlier) if earlier else None,
        answers=texts,
        earlier_asked=len(earlier),
    )


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Log-probabilities [n, vocabulary] of logits of the same shape, in nats."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def base_kl(
    base: Student,
    candidate: Student,
    general: Sequence[tuple[str, str]],
    progress: Callable[[int], None] = lambda _: None,
) -> float:
    """Mean KL(base || candidate) a token, in nats, along the base's answers to general prompts."""
    means = []
    for done, (prompt, answer) in enumerate(general, 1):
        messages = chat(SYSTEM, [Message("user", prompt)])
        first = len(base.encode(messages)) - 1
        ids = base.tokenizer.encode(render(messages) + answer, add_special_tokens=False).ids[:-1]
        if len(ids) <= first:  # an empty answer says nothing
            continue
        ours = log_softmax(base.logits(ids, first))
        theirs = log_softmax(candidate.logits(ids, first))
        means.append(float((np.exp(ours) * (ours - theirs)).sum(axis=1).mean()))
        progress(done)
    return float(np.mean(means)) if means else float("nan")  # which passes no bound


@dataclass(frozen=True)
class GateInput:
    """The three bundles, the demonstrations nobody trained on, and ``general``: the base's answers.

    ``general`` holds (prompt, answer); no training may have seen the prompts.
    """

    base: Path
    current: Path
    candidate: Path
    new: tuple[Shown, ...]
    earlier: tuple[Shown, ...]
    general: tuple[tuple[str, str], ...]


def run(
    given: GateInput, config: GateConfig, progress: Callable[[str, float], None] = lambda *_: None
) -> Verdict:
    """Open the bundles one after another and judge the candidate.

    Raises:
        IntegrityError: a bundle is broken.
    """
    progress("gate: student in service", 0.0)
    current = Student.open(given.current, threads=config.threads)
    before = score(current, given.new, given.earlier)
    current.close()
    progress("gate: candidate", 0.3)
    candidate = Student.open(given.candidate, threads=config.threads)
    after = score(candidate, given.new, given.earlier)
    base = Student.open(given.base, threads=config.threads)
    kl = base_kl(
        base,
        candidate,
        given.general,
        lambda n: progress("gate: general prompts", 0.6 + 0.4 * n / len(given.general)),
    )
    base.close()
    candidate.close()
    return judge(before, after, kl, config)
