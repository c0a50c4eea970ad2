"""One job of learning, whatever the learner: score, measure the teacher, train, survive.

:func:`learn` is the one protocol: a model, a course and options in, learnt parameters out. Learners
differ in their options only (:data:`cloud.learners.config.PRESETS`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cloud.learners import worth
from cloud.learners.checkpoint import Checkpoints, key_of
from cloud.learners.course import Outcome
from cloud.learners.objectives import Objective, Sdft, Sft
from cloud.learners.precision import fp32_products
from cloud.learners.scoring import score_all
from cloud.learners.training import Training
from protos.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from cloud.learners.config import LearnerConfig
    from cloud.learners.course import Control, Course
    from cloud.learners.model import SplitModel
    from cloud.learners.targets import Target

log = logging.getLogger("anabranch.learners")


def learn(
    model: SplitModel,
    course: Course,
    config: LearnerConfig,
    control: Control,
    *,
    end: int,
    learnt: Mapping[str, torch.Tensor] | None = None,
) -> Outcome:
    """Learn a course.

    Args:
        model: with the weights it was imported with; it is trained in place.
        course: what to learn and what to hold on to.
        config: the learner.
        control: who watches, and where checkpoints go. Killed at any time and called again with the
            same arguments, it comes to the same weights (to the last bit on the same machine, as
            long as neither a budget nor a divergence ends it). Who has stored the outcome removes
            the checkpoints.
        end: id of the token that ends an answer.
        learnt: weights of the release before, by name in the whole model.

    Raises:
        TrainingError: there is nothing to learn from, the teacher is not better and the fallback is
            to stop, the budget ended before the first step, or the loss diverged before anything
            was learnt.
    """
    if not course.lessons:
        msg = "nothing to learn: there is no demonstration"
        raise TrainingError(msg)
    with fp32_products("bf16" if model.bf16 else "ieee"):
        return _learn(model, course, config, control, end=end, learnt=learnt or {})


def _learn(
    model: SplitModel,
    course: Course,
    config: LearnerConfig,
    control: Control,
    *,
    end: int,
    learnt: Mapping[str, torch.Tensor],
) -> Outcome:
    began = control.clock()
    files = Checkpoints(
        control.folder, key_of((course, config, model.bf16), model.weights(), learnt)
    )
    scores, imported = score_all(model, course, config, control, files, learnt, began=began)
    measured = _worth(course, scores)
    method = _method(config, measured)
    if config.rank:
        model.add_adapters(config.rank, config.alpha, config.seed)
    objective: Objective
    if method == "sft":
        objective = Sft(course.lessons)
    else:
        teacher = imported if config.teacher == "imported" else None
        if config.teacher in {"ema", "frozen"} and not config.scored_once:
            teacher = model.copy_upper()
        objective = Sdft(
            model,
            course.lessons,
            config,
            teacher=teacher,
            scored=scores["teacher"],
            base=scores["base"],
            end=end,
        )
    training = Training(model, course, config, control, objective, scores, files)
    stopped = training.run(method, control.clock() - began)
    return Outcome(
        model.learnt(),
        method,
        "bf16" if model.bf16 else "fp32",
        training.step,
        stopped,
        measured,
        frozenset(training.seen),
        training.scoring,
        training.seconds,
    )


def _worth(course: Course, scores: Mapping[str, Sequence[Target]]) -> worth.Worth | None:
    if not scores["held_teacher"]:
        return None
    answers = [lesson.student.answer for lesson in course.held_out]
    return worth.measure(scores["held_teacher"], scores["held_student"], answers)


def _method(config: LearnerConfig, measured: worth.Worth | None) -> str:
    """What to learn by after the teacher was measured."""
    if config.method != "sdft" or config.fallback == "ignore":
        return config.method
    if measured is not None and measured.clear:
        log.info("the teacher is worth its words: %s", measured)
        return config.method
    found = measured or "no demonstration was held out to measure it by"
    if config.fallback == "stop":
        msg = f"the teacher is not clearly better than the student: {found}"
        raise TrainingError(msg)
    log.warning("not distilled, but learnt by cross-entropy: %s", found)
    return "sft"
