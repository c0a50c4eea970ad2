"""What is scored once, before the first step: all distributions that stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud.learners import targets
from cloud.learners.memory import Memory
from protos.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from cloud.learners.checkpoint import Checkpoints
    from cloud.learners.config import LearnerConfig
    from cloud.learners.course import Control, Course
    from cloud.learners.model import SplitModel, Upper
    from cloud.learners.packing import Example
    from cloud.learners.targets import Target

_NAMES = ("anchors", "replay", "teacher", "base", "held_teacher", "held_student")

_HELD = 256
"""Tokens kept of what a student is held to: with fewer it moves where the loss does not see it."""

# Read once: what the frozen layers made of them is not kept.
_ONCE = frozenset({"teacher", "held_teacher", "held_student"})


def score_all(
    model: SplitModel,
    course: Course,
    config: LearnerConfig,
    control: Control,
    files: Checkpoints,
    learnt: Mapping[str, torch.Tensor],
    *,
    began: float,
) -> tuple[dict[str, list[Target]], Upper | None]:
    """Score a course, and load the release before.

    The imported model speaks first (``anchors``; ``teacher`` and ``held_teacher`` if it teaches;
    ``base``: the lessons without being shown them). Then ``learnt`` is loaded, and the student as
    the job finds it speaks (``replay``, ``held_student``). Kept scores are not made again; those of
    the anchors are kept for other jobs, too. The budget counts from ``began`` by the job's clock.

    Raises:
        TrainingError: the budget ended.

    Returns:
        Distributions by name, empty lists where none are needed; and a copy of the imported upper
        layers where they go on teaching.
    """
    # Always first and in this order, whether the job is new or goes on: how sequences are packed
    # changes their last bits, and Adam makes much of little.
    model.encode([*(lesson.student for lesson in course.lessons), *course.replay])
    if config.method == "sdft" and not config.scored_once and config.rollouts != "on-policy":
        model.encode([lesson.teacher for lesson in course.lessons])
    anchors = course.anchors if config.anchor_batch else ()
    memory = Memory(control.memory, model, anchors, config.row_tokens, _HELD)
    known = memory.load()
    model.encode(course.anchors)  # after all others: other jobs take over what is made of them
    found = files.load_scores()
    if found is not None:
        found = {name: [t.to(model.device) for t in ts] for name, ts in found.items()}
    else:
        early, late = _wanted(course, config)
        if known is None:
            early = {"anchors": anchors, **early}
        scoring = _Scoring(model, config, control, [*early.values(), *late.values()], began)
        scoring.run(early)
        if known is None:
            memory.save(scoring.found["anchors"])
        else:
            scoring.found["anchors"] = known
    teaches = config.method == "sdft" and config.teacher == "imported" and not config.scored_once
    imported = model.copy_upper() if teaches else None
    model.load(learnt)
    if found is None:
        scoring.run(late)
        found = scoring.found
        files.save_scores(found)
    return found, imported


def no_time_left(budget: float, spent: float) -> TrainingError:
    """The error of a job whose ``budget`` went by before its first step (both in seconds)."""
    return TrainingError(
        f"the budget of {budget:.0f} s ended before the first step, {spent:.0f} s went into "
        "scoring: allow more"
    )


def _wanted(
    course: Course, config: LearnerConfig
) -> tuple[dict[str, Sequence[Example]], dict[str, Sequence[Example]]]:
    """What the imported model scores besides the anchors, and what the student that serves."""
    early: dict[str, Sequence[Example]] = {}
    late: dict[str, Sequence[Example]] = {"replay": course.replay if config.replay_batch else ()}
    if config.method == "sdft":
        teaching = early if config.teacher == "imported" else late
        if config.scored_once:
            teaching["teacher"] = [lesson.teacher for lesson in course.lessons]
        if config.fallback != "ignore":
            teaching["held_teacher"] = [lesson.teacher for lesson in course.held_out]
            late["held_student"] = [lesson.student for lesson in course.held_out]
        if config.base_weight:
            early["base"] = [lesson.student for lesson in course.lessons]
    return early, late


class _Scoring:
    def __init__(
        self,
        model: SplitModel,
        config: LearnerConfig,
        control: Control,
        groups: Sequence[Sequence[Example]],
        began: float,
    ) -> None:
        self._model = model
        self._config = config
        self._control = control
        self._began = began
        self._total = sum(example.length for group in groups for example in group)
        self._done = 0
        self.found: dict[str, list[Target]] = {name: [] for name in _NAMES}

    def run(self, wanted: Mapping[str, Sequence[Example]]) -> None:
        for name, examples in wanted.items():
            scored = targets.score(
                self._model,
                self._model.upper,
                examples,
                tokens=self._config.row_tokens,
                kept=self._kept(name),
                keep=name not in _ONCE,
            )
            for example, target in zip(examples, scored, strict=True):
                self.found[name].append(target)
                self._done += example.length
                phase = f"score {name.replace('_', ' ')}"
                self._control.phase(phase, self._done / self._total)
                self._watch()

    def _watch(self) -> None:
        budget = self._config.budget_seconds
        if budget and (spent := self._control.clock() - self._began) > budget:
            raise no_time_left(budget, spent)

    def _kept(self, name: str) -> int:
        if name == "teacher":
            return self._config.top_k
        return _HELD if name in {"anchors", "replay"} else targets.KEPT
