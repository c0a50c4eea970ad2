"""A course for the tiny model, and a run of a learner on it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM

from cloud.learners.config import LearnerConfig
from cloud.learners.course import Control, Course, Lesson, Outcome, StepReport
from cloud.learners.learner import learn
from cloud.learners.model import SplitModel
from cloud.learners.packing import Example

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

CPU = torch.device("cpu")
END = 2
LESSONS = [Example((5, 6, 7), (10 + i, 11, 12 + 2 * i), (20 + i, 21, 22, END)) for i in range(6)]
OTHERS = [Example((8, 9), (30, 31), (40, 41, END)), Example((), (50, 51, 52), (60, END))]
EXAMPLES = LESSONS + OTHERS


def long(tokens: int) -> Example:
    """So many tokens behind a system prompt: with 200, more pairs than attention writes out."""
    return Example((5, 6, 7), tuple(3 + i * 7 % 190 for i in range(tokens)), (20, 21, END))


def lesson(e: Example) -> Lesson:
    """Shown once before it is asked."""
    return Lesson(e, Example(e.prefix, (*e.prompt, *e.answer, *e.prompt), e.answer))


COURSE = Course(
    lessons=tuple(map(lesson, LESSONS[:5])),
    held_out=tuple(map(lesson, LESSONS[3:])),
    replay=tuple(LESSONS[4:]),
    anchors=tuple(OTHERS),
)


def load(folder: Path) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    return model


def split(folder: Path, config: LearnerConfig) -> SplitModel:
    """The tiny model, two layers deep, cut for a learner."""
    first, last = (round(2 * share) for share in config.layers)
    return SplitModel(
        load(folder),
        split=first,
        end=last,
        embeddings=config.embeddings,
        device=CPU,
        bf16=config.precision == "bf16",
    )


def small(name: str, **changes: Any) -> LearnerConfig:  # noqa: ANN401
    """A preset, small enough for the tiny model, which no teacher is worth listening to."""
    size = {"steps": 12, "batch": 4, "learning_rate": 3e-3, "cap": 8, "warmup": 2}
    return LearnerConfig.named(name, **({"fallback": "ignore"} | size | changes))


def run(
    folder: Path,
    config: LearnerConfig,
    *,
    course: Course = COURSE,
    keep: Path | None = None,
    report: Callable[[StepReport], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    learnt: Mapping[str, torch.Tensor] | None = None,
    phase: Callable[[str, float], None] = lambda _, __: None,
    memory: Path | None = None,
) -> Outcome:
    control = Control(clock, report=report, phase=phase, folder=keep, memory=memory)
    return learn(split(folder, config), course, config, control, end=END, learnt=learnt)
