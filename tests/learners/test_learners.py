"""What every learner does, by one suite; then what sets them apart. On the tiny student."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cloud.learners.config import PRESETS, LearnerConfig, read_options
from cloud.learners.course import Control, Course
from cloud.learners.learner import learn
from cloud.learners.model import SplitModel
from cloud.learners.objectives import Sdft
from cloud.learners.packing import Example
from protos.errors import InvalidInputError, TrainingError

if TYPE_CHECKING:
    from pathlib import Path

    from cloud.learners.course import StepReport
    from tests.learners.learner_course import (
        COURSE,
        CPU,
        END,
        LESSONS,
        lesson,
        load,
        run,
        small,
        split,
    )
else:
    from learner_course import COURSE, CPU, END, LESSONS, lesson, load, run, small, split

_SAMPLED: dict[str, Any] = {
    "rollouts": "on-policy",
    "mask_truncated": False,
    "hint": (0.0, 0.0),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "reverse": {"divergence": "reverse"},
    "js": {"divergence": "js", "js_beta": 0.3},
    "full vocabulary": {"top_k": 0},
    "frozen teacher": {"teacher": "frozen"},
    "ema teacher": {"teacher": "ema", "ema_rate": 0.1},
    "current teacher": {"teacher": "current"},
    "demonstrations": {"rollouts": "demonstration"},
    "on-policy": _SAMPLED,
    "skip": {"skip": 2},
    "hint": {"hint": (0.5, 0.1)},
    "as the teacher says": {"sharpness": 1.0, "hint": (0.0, 0.0)},
    "the lower layer": {"layers": (0.0, 0.5)},
    "all layers": {"layers": (0.0, 1.0)},
    "rank": {"rank": 2},
    "bf16": {"precision": "bf16"},
    "bf16 samples": {"precision": "bf16", **_SAMPLED},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sharpness": {"sharpness": 1.0},
    "guidance": {"guidance": 0.0},
    "proximal": {"proximal": 0.25},
    "base weight": {"base_weight": 5.0},
    "fewer anchors": {"anchor_batch": 1},
    "less replay": {"replay_batch": 1},
    "steps": {"steps": 7},
    "batch": {"batch": 2},
    "rate": {"learning_rate": 1e-3},
    "warm-up": {"warmup": 4},
    "alpha": {"alpha": 4.0},
    "everything": {"layers": (0.0, 1.0), "embeddings": True},
    "anchor weight": {"anchor_weight": 9.0},
    "replay weight": {"replay_weight": 9.0},
    "ewc": {"ewc": 1e3},
    "ema rate": {"ema_rate": 0.9},
    "part of the mixture": {"js_beta": 0.9},
    "temperature": {"temperature": 0.2},
    "masked": {"mask_truncated": True},
    "cap": {"cap": 2},
    "cosine": {"schedule": "cosine"},
    "weight decay": {"weight_decay": 0.5},
    "clip": {"clip": 0.01},
    "seed": {"seed": 1},
}
BESIDE: dict[str, dict[str, Any]] = {
    "alpha": {"rank": 2},
    "everything": {"layers": (0.0, 1.0)},
    "guidance": {"hint": (0.0, 0.0)},
    "ema rate": {"teacher": "ema", "ema_rate": 0.1},
    "part of the mixture": {"divergence": "js", "js_beta": 0.3},
    "temperature": _SAMPLED,
    "masked": _SAMPLED,
    "cap": _SAMPLED,
    "bf16 samples": _SAMPLED,
}
"""What an option is compared with, where it is not the preset as it is."""
every_learner = pytest.mark.parametrize("name", PRESETS)
every_kind = pytest.mark.parametrize("kind", [*PRESETS, *VARIANTS])


def config_of(kind: str, **changes: Any) -> LearnerConfig:  # noqa: ANN401
    if kind in PRESETS:
        return small(kind, **changes)
    return small("sdft", **(VARIANTS[kind] | changes))


@every_kind
def test_it_trains_step_by_step_and_changes_only_what_it_may(kind: str, tiny_folder: Path) -> None:
    config = config_of(kind, steps=4)
    seen: list[StepReport] = []
    outcome = run(tiny_folder, config, report=seen.append)
    assert [s.step for s in seen] == [1, 2, 3, 4]
    assert seen[-1].fraction == 1.0
    assert (outcome.steps, outcome.stopped, outcome.method) == (4, "", config.method)
    before = load(tiny_folder).state_dict()
    first, last = (round(2 * share) for share in config.layers)
    allowed = [f"model.layers.{i}." for i in range(first, last)]
    if last == 2 and not config.rank:
        allowed.append("model.norm")
    if config.embeddings:
        allowed += ["model.embed_tokens", "lm_head"]
    assert all(n.startswith(tuple(allowed)) for n in outcome.parameters)
    assert all(v.shape == before[n].shape for n, v in outcome.parameters.items())
    if kind != "sdft-paper":  # its samples of a random model rarely end: they may all be masked
        assert any(not torch.equal(v, before[n]) for n, v in outcome.parameters.items())


@every_kind
def test_the_same_seed_gives_the_same_weights(kind: str, tiny_folder: Path) -> None:
    one, two = (run(tiny_folder, config_of(kind, steps=3, batch=2)).parameters for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("kind", [*VARIANTS, *OPTIONS])
def test_every_option_changes_what_is_learnt(kind: str, tiny_folder: Path) -> None:
    """Each beside the same without it: an option that does nothing would pass all other tests."""
    given = (VARIANTS | OPTIONS)[kind]
    plain = dict(BESIDE.get(kind, {}))
    layers = (plain | given).get("layers", (0.5, 1.0))
    learnt = None  # by an earlier job, whose layers must be among those that learn now
    if layers[1] == 1.0:
        learnt = run(tiny_folder, small("sft", steps=30)).parameters
    ours, other = (
        run(tiny_folder, small("sdft", **({"steps": 6} | options)), learnt=learnt).parameters
        for options in (plain | given, plain)
    )
    common = ours.keys() & other.keys()
    assert not common or any(not torch.equal(ours[n], other[n]) for n in common)
    assert common or kind == "the lower layer"


def test_no_option_is_left_untried() -> None:
    """What is not here is tried elsewhere: by prompts, by jobs, by what they cost."""
    tried = {name for given in (VARIANTS | OPTIONS).values() for name in given}
    elsewhere = {"method", "fallback", "teacher_prompt", "shown", "anchor_tokens", "row_tokens"}
    elsewhere |= {"budget_seconds", "checkpoint_seconds"}
    assert tried | elsewhere == {f.name for f in fields(LearnerConfig)}
    assert not tried & elsewhere


def test_an_averaged_teacher_moves_to_the_student_by_its_rate(tiny_folder: Path) -> None:
    config = small("sdft", teacher="ema", top_k=0, ema_rate=0.25)
    model = split(tiny_folder, config)
    student = model.trainable()["norm.weight"].requires_grad_()
    teacher = model.copy_upper()
    ours = Sdft(model, COURSE.lessons, config, teacher=teacher, scored=(), base=(), end=END)
    theirs = ours.state()
    before = {n: p.clone() for n, p in theirs.items()}
    with torch.no_grad():
        student += 4.0
    for moved in (1.0, 1.75):
        ours.after_step()
        assert torch.allclose(theirs["norm.weight"], before["norm.weight"] + moved)
    del theirs["norm.weight"]
    assert all(torch.equal(p, before[n]) for n, p in theirs.items())


def test_the_papers_recipe_is_the_papers() -> None:
    """Shenfeld et al., arXiv 2601.19897, and their code: what decides it, option by option."""
    paper = LearnerConfig.named("sdft-paper")
    assert (paper.method, paper.divergence, paper.top_k, paper.sharpness) == (
        *("sdft", "forward", 0, 1.0),
    )
    assert (paper.teacher, paper.ema_rate, paper.teacher_prompt) == ("ema", 0.01, "prose")
    assert (paper.rollouts, paper.temperature, paper.skip, paper.mask_truncated) == (
        *("on-policy", 1.0, 3, False),
    )
    assert (paper.layers, paper.embeddings, paper.rank) == ((0.0, 1.0), True, 0)
    assert (paper.schedule, paper.warmup, paper.clip, paper.weight_decay) == ("cosine", 10, 1.0, 0)
    assert (paper.learning_rate, paper.batch, paper.fallback) == (2e-5, 32, "ignore")
    assert (paper.hint, paper.proximal, paper.base_weight) == ((0.0, 0.0), 1.0, 0.0)
    assert (paper.anchor_batch, paper.replay_batch, paper.ewc) == (0, 0, 0.0)


@every_learner
def test_the_lessons_loss_falls(name: str, tiny_folder: Path) -> None:
    losses: list[float] = []
    # Samples of a random model hardly repeat, and a target that moves away hides what is learnt.
    changes: dict[str, dict[str, Any]] = {
        "sdft-paper": {"rollouts": "demonstration"},
        "isdft": {"proximal": 0.9},
    }
    # A hint that fades would make the loss fall by itself.
    config = small(name, steps=30, hint=(0.0, 0.0), **changes.get(name, {}))
    run(tiny_folder, config, report=lambda s: losses.append(s.loss))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@every_learner
def test_nothing_to_learn_is_an_error(name: str, tiny_folder: Path) -> None:
    with pytest.raises(TrainingError, match="no demonstration"):
        run(tiny_folder, small(name), course=Course(()))


@every_learner
def test_a_diverging_loss_before_anything_is_learnt_says_what_to_do(
    name: str, tiny_folder: Path
) -> None:
    wild = {"learning_rate": 1e30, "warmup": 0, "clip": 1e9}
    config = small(name, rollouts="demonstration", top_k=0, **wild)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        run(tiny_folder, config)


@every_learner
def test_learning_goes_on_from_the_release_before(name: str, tiny_folder: Path) -> None:
    first = run(tiny_folder, small(name, steps=8, rollouts="demonstration"))
    losses: list[float] = []
    config = small(name, steps=1, learning_rate=1e-9, rollouts="demonstration", batch=5)
    run(tiny_folder, config, learnt=first.parameters, report=lambda s: losses.append(s.loss))
    run(tiny_folder, config, report=lambda s: losses.append(s.loss))
    assert losses[0] < losses[1]


def test_an_unknown_learner_or_option_is_named_with_what_there_is() -> None:
    with pytest.raises(InvalidInputError, match="no learner is named 'sdtf': choose from sdft"):
        small("sdtf")
    with pytest.raises(InvalidInputError, match="no option speed"):
        small("sdft", speed=9)
    with pytest.raises(InvalidInputError, match="choose from forward, reverse, js"):
        small("sdft", divergence="forwards")
    with pytest.raises(InvalidInputError, match="shares of the depth"):
        small("sdft", layers=(0.5, 0.5))
    with pytest.raises(InvalidInputError, match="a hint needs rollouts along"):
        small("sdft", rollouts="on-policy")
    with pytest.raises(InvalidInputError, match="embeddings train only with all layers"):
        small("sdft", embeddings=True)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("speed=9", "no option 'speed': choose from alpha"),
        ("rank", "such as rank=0"),
        ("steps=many", "such as steps=75"),
        ("steps=7.5", "such as steps=75"),
        ("embeddings=1", "such as embeddings=false"),
        ("layers=0.5", r"such as layers=\[0.5, 1.0\]"),
        ("layers=[0.5]", r"such as layers=\[0.5, 1.0\]"),
        ("hint=[true, 0]", "such as hint"),
        ("method=7", "such as method=sdft"),
    ],
)
def test_a_word_that_is_no_option_says_what_would_be(word: str, said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        read_options([word])


def test_words_make_a_learner() -> None:
    words = ["layers=[0, 1]", "rank=8", "alpha=4", "fallback=stop", 'schedule="cosine"']
    made = LearnerConfig.named("sft", **read_options(words))
    assert made == LearnerConfig.named(
        "sft", layers=(0, 1), rank=8, alpha=4.0, fallback="stop", schedule="cosine"
    )


def test_the_anchor_holds_the_student_to_the_base(tiny_folder: Path) -> None:
    def drift(weight: float) -> float:
        config = small("sft-anchored", steps=25, anchor_weight=weight, replay_batch=0)
        after = run(tiny_folder, config).parameters
        seen: list[StepReport] = []
        watch = small("sft-anchored", steps=1, learning_rate=1e-9, anchor_batch=2)
        run(tiny_folder, watch, learnt=after, report=seen.append)
        return seen[0].anchor

    assert drift(20.0) < 0.5 * drift(1e-6)


def test_replay_holds_earlier_answers(tiny_folder: Path) -> None:
    def drift(batch: int) -> float:
        config = small("sft-replay", steps=25, replay_batch=batch, replay_weight=20.0)
        course = replace(COURSE, lessons=COURSE.lessons[:3], replay=tuple(LESSONS[4:]))
        after = run(tiny_folder, config, course=course).parameters
        # Scored again by the release before: what moved away since the import is in the anchors.
        watch = small("sft-anchored", steps=1, learning_rate=1e-9, anchor_batch=2)
        seen: list[StepReport] = []
        held = replace(course, anchors=tuple(LESSONS[4:]))
        run(tiny_folder, watch, course=held, learnt=after, report=seen.append)
        return seen[0].anchor

    assert drift(2) < 0.5 * drift(0)


def test_ewc_holds_weights_near_where_they_were(tiny_folder: Path) -> None:
    start = load(tiny_folder).state_dict()

    def moved(strength: float) -> float:
        config = small("ewc", steps=15, ewc=strength)
        after = run(tiny_folder, config).parameters
        return sum(float((v - start[n]).square().sum()) for n, v in after.items())

    assert moved(1e6) < 0.9 * moved(1e-9)


def test_samples_that_the_cap_cut_count_for_nothing(tiny_folder: Path) -> None:
    config = small("sdft", rollouts="on-policy", cap=1, hint=(0.0, 0.0), anchor_batch=0)
    losses: list[float] = []
    course = replace(COURSE, replay=())
    run(tiny_folder, config, course=course, report=lambda s: losses.append(s.loss))
    assert min(losses) == 0.0


def test_a_teacher_that_is_no_better_is_not_distilled(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        outcome = run(tiny_folder, small("sdft", fallback="sft"))
    assert outcome.method == "sft"
    assert outcome.worth is not None
    assert not outcome.worth.clear
    assert "not distilled, but learnt by cross-entropy" in caplog.text
    with pytest.raises(TrainingError, match="not clearly better than the student: on 3 held-out"):
        run(tiny_folder, small("sdft", fallback="stop"))


def test_a_teacher_that_nothing_measures_is_not_distilled(tiny_folder: Path) -> None:
    unmeasured = replace(COURSE, held_out=())
    assert run(tiny_folder, small("sdft", fallback="sft"), course=unmeasured).method == "sft"
    with pytest.raises(TrainingError, match="no demonstration was held out to measure it by"):
        run(tiny_folder, small("sdft", fallback="stop"), course=unmeasured)
    assert run(tiny_folder, small("sdft"), course=unmeasured).method == "sdft"


def test_a_long_demonstration_is_one_row_and_the_result_does_not_depend_on_rows(
    tiny_folder: Path,
) -> None:
    long = lesson(Example((5, 6, 7), tuple(range(10, 60)), (20, 21, 2)))
    course = replace(COURSE, lessons=(*COURSE.lessons, long))
    wide, narrow = (
        run(tiny_folder, small("sdft", steps=3, batch=6, row_tokens=rows), course=course).parameters
        for rows in (4096, 16)
    )
    assert all(torch.allclose(wide[n], narrow[n], atol=1e-4) for n in wide)


def test_layers_that_leave_nothing_to_learn_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(TrainingError, match="no layer would learn: widen `layers`"):
        SplitModel(load(tiny_folder), split=2, device=CPU)


def test_weights_learnt_below_the_layers_that_learn_now_are_kept(tiny_folder: Path) -> None:
    before = run(tiny_folder, small("sft", layers=(0.0, 0.5), steps=8)).parameters
    model = SplitModel(load(tiny_folder), split=0, begin=1, device=CPU)
    losses: list[float] = []
    control = Control(time.monotonic, report=lambda s: losses.append(s.loss))
    config = small("sft", layers=(0.5, 1.0), steps=1, learning_rate=1e-9, batch=5)
    after = learn(model, COURSE, config, control, end=END, learnt=before)
    run(tiny_folder, config, report=lambda s: losses.append(s.loss))
    assert losses[0] < losses[1]
    assert all(n.startswith(("model.layers.1.", "model.norm")) for n in after.parameters)


def test_embeddings_learnt_before_are_kept_and_learn_no_more(tiny_folder: Path) -> None:
    everything = small("sft", layers=(0.0, 1.0), embeddings=True, steps=8)
    before = run(tiny_folder, everything).parameters
    assert any("embed_tokens" in n for n in before)
    model = SplitModel(load(tiny_folder), split=0, begin=1, held_embeddings=True, device=CPU)
    control = Control(time.monotonic)
    after = learn(model, COURSE, small("sdft", steps=2), control, end=END, learnt=before)
    assert all(n.startswith(("model.layers.1.", "model.norm")) for n in after.parameters)
    with pytest.raises(TrainingError, match="was learnt before and cannot be gone on from"):
        run(tiny_folder, small("sdft"), learnt=before)


def test_skipping_more_tokens_than_an_answer_has_leaves_its_last(tiny_folder: Path) -> None:
    losses: list[float] = []
    run(tiny_folder, small("sdft", steps=2, skip=9), report=lambda s: losses.append(s.loss))
    assert all(math.isfinite(loss) for loss in losses)


def test_ewc_holds_to_the_anchors_before_there_is_replay(tiny_folder: Path) -> None:
    start = load(tiny_folder).state_dict()

    def moved(strength: float) -> float:
        course = replace(COURSE, replay=())
        after = run(tiny_folder, small("ewc", steps=15, ewc=strength), course=course).parameters
        return sum(float((v - start[n]).square().sum()) for n, v in after.items())

    assert moved(1e6) < 0.9 * moved(1e-9)
