"""What one job learns from, in tokens, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from cloud.learners.packing import Example
    from cloud.learners.worth import Worth


@dataclass(frozen=True)
class Lesson:
    """One demonstration in tokens: the student's view, and the teacher's with the same answer."""

    student: Example
    teacher: Example


@dataclass(frozen=True)
class Course:
    """All that a job learns from.

    ``lessons`` are learnt and ``held_out`` only measure the teacher's worth; ``replay`` are earlier
    demonstrations, ``anchors`` answers that the imported model wrote itself.
    """

    lessons: tuple[Lesson, ...]
    held_out: tuple[Lesson, ...] = ()
    replay: tuple[Example, ...] = ()
    anchors: tuple[Example, ...] = ()


@dataclass(frozen=True)
class StepReport:
    """How one step went.

    Losses in nats a token (the lessons', the anchors', the replay's), shares of tokens replaced and
    of rollouts cut, ``rate`` the learning rate, ``fraction`` done of the whole job's steps (0..1),
    and ``seconds`` the step took.
    """

    step: int
    fraction: float
    loss: float
    anchor: float
    replay: float
    replaced: float
    cut: float
    rate: float
    seconds: float


@dataclass(frozen=True)
class Control:
    """How a job is watched and kept.

    ``report`` is called after each step, ``phase`` with a name and the fraction (0..1) of what goes
    before the first step. ``folder`` keeps checkpoints, ``memory`` what the next job of the same
    import need not read again (None: nothing is kept). ``clock`` is in seconds.
    """

    clock: Callable[[], float]
    report: Callable[[StepReport], None] = lambda _: None
    phase: Callable[[str, float], None] = lambda _, __: None
    folder: Path | None = None
    memory: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What a job learnt.

    ``parameters`` by name in the whole model; ``method`` and ``precision`` (``fp32`` or ``bf16``)
    that were used after all; ``stopped`` says why it ended before its steps, or is empty; ``seen``
    are numbers of lessons that these weights learnt from: a job that ends early has not seen all.
    ``scoring_seconds`` went before the first step, ``step_seconds`` are each step's; both count
    what was spent before a kill, but for what no checkpoint had yet.
    """

    parameters: dict[str, torch.Tensor]
    method: str
    precision: str
    steps: int
    stopped: str
    worth: Worth | None
    seen: frozenset[int]
    scoring_seconds: float
    step_seconds: list[float] = field(default_factory=list)
