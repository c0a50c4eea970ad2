"""Killed, resumed, out of time, diverged, on a full disk: a job keeps what it has."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cloud.learners.checkpoint import remove_checkpoints
from cloud.learners.course import Control
from cloud.learners.learner import learn
from cloud.learners.packing import Example
from edge.delta.files import AtomicFile
from protos.errors import StorageError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloud.learners.config import LearnerConfig
    from cloud.learners.course import StepReport
    from tests.learners.learner_course import COURSE, END, run, small, split
else:
    from learner_course import COURSE, END, run, small, split

KINDS: dict[str, dict[str, Any]] = {
    "sdft": {},
    "sft-anchored": {"precision": "bf16"},
    "sdft-paper": {"rollouts": "on-policy", "mask_truncated": False, "cap": 4, "skip": 0},
    "lora": {},
    "ewc": {},
    "isdft": {"replay_batch": 2, "teacher": "ema", "top_k": 0},
}


class PowerLossError(Exception):
    """The lights go out."""


def _out_after(step: int) -> Callable[[StepReport], None]:
    def report(seen: StepReport) -> None:
        if seen.step == step:
            raise PowerLossError

    return report


@pytest.mark.parametrize("name", KINDS)
def test_a_job_that_was_killed_comes_to_the_same_weights(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    config = small(name, **(KINDS[name] | {"checkpoint_seconds": 0.0}))
    whole = run(tiny_folder, config)
    for step in (5, 9):
        with pytest.raises(PowerLossError):
            run(tiny_folder, config, keep=tmp_path, report=_out_after(step))
    seen: list[StepReport] = []
    again = run(tiny_folder, config, keep=tmp_path, report=seen.append)
    assert seen[0].step == 9  # the ninth step was not yet kept when the lights went out
    assert all(torch.equal(whole.parameters[n], again.parameters[n]) for n in whole.parameters)
    assert {p.name for p in tmp_path.iterdir()} == {"scores.pt", "checkpoint.pt"}
    (tmp_path / "checkpoint.pt.tmp").touch()  # of a kill in the middle of writing
    remove_checkpoints(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_spent_and_seen_before_a_kill_is_counted(
    tiny_folder: Path, tmp_path: Path
) -> None:
    ticks = itertools.count()

    def clock() -> float:
        return float(next(ticks))

    config = small("sft-replay", steps=12, batch=1, checkpoint_seconds=0.0)
    with pytest.raises(PowerLossError):
        run(tiny_folder, config, keep=tmp_path, report=_out_after(9), clock=clock)
    again = run(tiny_folder, config, keep=tmp_path, clock=clock)
    assert len(again.step_seconds) == 12
    assert again.seen == {0, 1, 2, 3, 4}
    short = run(tiny_folder, replace(config, steps=3))
    assert len(short.seen) == 3


def test_sigkill_in_the_middle_leaves_a_checkpoint_that_is_whole(
    tiny_folder: Path, tmp_path: Path
) -> None:
    script = (
        "import sys, time; from pathlib import Path; from learner_course import run, small\n"
        "config = small('sdft', steps=60, checkpoint_seconds=0.0)\n"
        "run(Path(sys.argv[1]), config, keep=Path(sys.argv[2]))\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_folder), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    config = small("sdft", steps=60, checkpoint_seconds=0.0)
    seen: list[StepReport] = []
    again = run(tiny_folder, config, keep=tmp_path, report=seen.append)
    assert seen[0].step > 1
    whole = run(tiny_folder, config)
    assert all(
        torch.allclose(whole.parameters[n], again.parameters[n], atol=1e-6)
        for n in whole.parameters
    )


def test_what_was_scored_is_not_scored_again(tiny_folder: Path, tmp_path: Path) -> None:
    config = small("sdft")
    with pytest.raises(PowerLossError):
        run(tiny_folder, config, keep=tmp_path, report=_out_after(1))
    assert [p.name for p in tmp_path.iterdir()] == ["scores.pt"]
    whole = run(tiny_folder, config)
    phases: list[str] = []
    again = run(tiny_folder, config, keep=tmp_path, phase=lambda name, _: phases.append(name))
    assert not phases
    assert all(torch.equal(whole.parameters[n], again.parameters[n]) for n in whole.parameters)


SHARING = Example(COURSE.lessons[0].student.prefix, (70, 71), (72, 73, 2))


def _anchors_scored(folder: Path, memory: Path, config: LearnerConfig, **more: Any) -> bool:  # noqa: ANN401
    """Whether a job has its anchors read; it comes to the weights of a job that kept nothing.

    One of them has the lessons' system prompt, which each job reads anew.
    """
    more = {"course": replace(COURSE, anchors=(*COURSE.anchors, SHARING))} | more
    phases: set[str] = set()
    ours = run(folder, config, memory=memory, phase=lambda name, _: phases.add(name), **more)
    alone = run(folder, config, **more)
    assert all(torch.equal(alone.parameters[n], ours.parameters[n]) for n in alone.parameters)
    return "score anchors" in phases


def test_what_the_import_says_to_anchors_is_read_by_the_first_job_only(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config = small("sft-anchored", steps=4)
    learnt = run(tiny_folder, config).parameters
    assert _anchors_scored(tiny_folder, tmp_path, config)
    assert not _anchors_scored(tiny_folder, tmp_path, config, learnt=learnt)
    for changes in ({}, {"teacher": "current"}, {"top_k": 0}):
        assert not _anchors_scored(tiny_folder, tmp_path, small("sdft", steps=4, **changes))


def test_anchors_are_read_again_when_they_or_the_split_or_the_file_are_others(
    tiny_folder: Path, tmp_path: Path
) -> None:
    config = small("sft-anchored", steps=3)
    assert _anchors_scored(tiny_folder, tmp_path, config)
    fewer = replace(COURSE, anchors=COURSE.anchors[:1])
    assert _anchors_scored(tiny_folder, tmp_path, config, course=fewer)
    whole = small("sft-anchored", steps=3, layers=(0.0, 1.0), embeddings=True)
    assert _anchors_scored(tiny_folder, tmp_path, whole)
    assert not _anchors_scored(tiny_folder, tmp_path, whole)
    whole = replace(whole, precision="bf16")
    assert _anchors_scored(tiny_folder, tmp_path, whole)
    assert not _anchors_scored(tiny_folder, tmp_path, whole)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert _anchors_scored(tiny_folder, tmp_path, whole)
    assert not _anchors_scored(tiny_folder, tmp_path, whole)


def test_a_full_disk_costs_the_anchors_memory_and_not_the_job(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: AtomicFile, __: bytes) -> None:
        msg = "writing: No space left on device"
        raise StorageError(msg)

    config = small("sft-anchored", steps=3)
    with monkeypatch.context() as patched:
        patched.setattr(AtomicFile, "write", full)
        assert _anchors_scored(tiny_folder, tmp_path, config)
    assert not list(tmp_path.iterdir())
    assert _anchors_scored(tiny_folder, tmp_path, config)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half a file"])
def test_a_broken_checkpoint_is_not_trusted(
    damage: bytes, tiny_folder: Path, tmp_path: Path
) -> None:
    config = small("sdft", steps=3)
    (tmp_path / "checkpoint.pt").write_bytes(damage)
    (tmp_path / "scores.pt").write_bytes(damage)
    assert run(tiny_folder, config, keep=tmp_path).steps == 3


def test_another_jobs_checkpoint_is_not_read(tiny_folder: Path, tmp_path: Path) -> None:
    config = small("sdft", checkpoint_seconds=0.0)
    with pytest.raises(PowerLossError):
        run(tiny_folder, config, keep=tmp_path, report=_out_after(6))
    seen: list[StepReport] = []
    run(tiny_folder, small("sdft", seed=1), keep=tmp_path, report=seen.append)
    assert seen[0].step == 1


def test_a_checkpoint_of_another_release_is_not_read(tiny_folder: Path, tmp_path: Path) -> None:
    config = small("sdft", checkpoint_seconds=0.0)
    before = run(tiny_folder, config).parameters
    with pytest.raises(PowerLossError):
        run(tiny_folder, config, keep=tmp_path, report=_out_after(6))
    seen: list[StepReport] = []
    run(tiny_folder, config, keep=tmp_path, report=seen.append, learnt=before)
    assert seen[0].step == 1


def test_a_full_disk_costs_the_checkpoint_and_not_the_job(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    left = 20_000
    write = AtomicFile.write

    def full(self: AtomicFile, data: bytes) -> None:
        nonlocal left
        left -= len(data)
        if left < 0:
            msg = "writing the checkpoint: No space left on device"
            raise StorageError(msg)
        write(self, data)

    monkeypatch.setattr(AtomicFile, "write", full)
    config = small("sdft", steps=3, checkpoint_seconds=0.0)
    assert run(tiny_folder, config, keep=tmp_path).steps == 3
    assert "is not written, what was there stays" in caplog.text
    assert "No space left on device" in caplog.text


def test_a_budget_ends_in_time_with_the_rate_on_its_way_down(tiny_folder: Path) -> None:
    ticks = itertools.count()
    seen: list[StepReport] = []
    config = small("sft", steps=100_000, budget_seconds=200.0)
    outcome = run(tiny_folder, config, report=seen.append, clock=lambda: float(next(ticks)))
    assert next(ticks) <= 203
    assert outcome.stopped == f"the budget of 200 s ended after {outcome.steps} steps"
    assert seen[len(seen) // 2].rate == config.learning_rate
    assert seen[-1].rate < 0.2 * config.learning_rate


def test_a_budget_too_small_for_one_step_says_so(tiny_folder: Path) -> None:
    ticks = itertools.count(step=100)
    with pytest.raises(TrainingError, match="ended before the first step"):
        run(tiny_folder, small("sdft", budget_seconds=50.0), clock=lambda: float(next(ticks)))


def test_scoring_ends_with_the_budget(tiny_folder: Path) -> None:
    ticks, phases = itertools.count(), list[str]()
    config = small("sdft", budget_seconds=2.0)
    with pytest.raises(TrainingError, match=r"before the first step, 3 s went into scoring"):
        run(
            tiny_folder,
            config,
            clock=lambda: float(next(ticks)),
            phase=lambda name, _: phases.append(name),
        )
    assert len(phases) == 3


def test_the_budget_counts_what_was_spent_before_a_kill_and_to_go_on(
    tiny_folder: Path, tmp_path: Path
) -> None:
    seconds, waited = itertools.count(), 0.0
    config = small("sft", steps=100_000, budget_seconds=100.0, checkpoint_seconds=0.0)

    def clock() -> float:
        return next(seconds) + waited

    with pytest.raises(PowerLossError):
        run(tiny_folder, config, keep=tmp_path, clock=clock, report=_out_after(15))
    before = next(seconds)

    model = split(tiny_folder, config)
    encode = model.encode

    def slow(sequences: Sequence[Example]) -> None:
        nonlocal waited
        waited = 40.0
        encode(sequences)

    model.encode = slow  # type: ignore[method-assign]
    control = Control(clock, folder=tmp_path)
    outcome = learn(model, COURSE, config, control, end=END)
    assert outcome.stopped.startswith("the budget of 100 s ended")
    assert waited
    assert 10 < next(seconds) - before < 30  # and some 55 if the 40 did not count


def _wild_from(step: int, monkeypatch: pytest.MonkeyPatch, rate: float = 1e3) -> None:
    """With this rate the loss rises three steps, to a few times of what it was, and diverges."""
    monkeypatch.setattr(
        "cloud.learners.training._rate", lambda now, _, __: 1.0 if now < step else rate
    )


@pytest.mark.parametrize("killed", [13, 14, 15])
def test_a_job_that_was_killed_while_it_diverged_returns_to_good_weights(
    killed: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of a checkpoint are what a resumed job returns to: none is made of bad ones."""
    config = small("sft", steps=40, checkpoint_seconds=0.0)
    good = run(tiny_folder, config).parameters
    _wild_from(12, monkeypatch)
    with pytest.raises(PowerLossError):
        run(tiny_folder, config, keep=tmp_path, report=_out_after(killed))
    outcome = run(tiny_folder, config, keep=tmp_path)
    assert outcome.stopped.endswith("the last good weights are kept")
    largest = max(float(p.abs().max()) for p in outcome.parameters.values())
    assert largest < 2 * max(float(p.abs().max()) for p in good.values())


def test_a_job_that_diverges_soon_after_a_kill_has_learnt_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("sft", steps=40, checkpoint_seconds=0.0)
    _wild_from(6, monkeypatch, 1e20)
    with pytest.raises(PowerLossError):
        run(tiny_folder, config, keep=tmp_path, report=_out_after(7))
    with pytest.raises(TrainingError, match="nothing was learnt"):
        run(tiny_folder, config, keep=tmp_path)


def test_a_loss_that_diverges_leaves_the_last_good_weights(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("sft", steps=40)
    good = run(tiny_folder, small("sft", steps=40), report=lambda _: None)
    _wild_from(12, monkeypatch, 1e20)
    outcome = run(tiny_folder, config)
    assert outcome.stopped.endswith("the last good weights are kept")
    assert 12 < outcome.steps < 40
    assert good.stopped == ""
    assert all(bool(p.isfinite().all()) for p in outcome.parameters.values())
    assert max(float(p.abs().max()) for p in outcome.parameters.values()) < 100
