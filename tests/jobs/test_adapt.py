"""The job's process on the tiny student: its spec, its result, its errors."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud import adapt
from cloud.adapt import Spec
from cloud.gate import gate
from cloud.gate.gate import GateConfig, Verdict
from cloud.jobs import Job
from cloud.learners.config import LearnerConfig
from edge.delta.files import AtomicFile, storage_errors
from edge.process import PARENT
from edge.student.bundle import digest
from edge.student.runtime import Decoding, Student
from protos.errors import TrainingError
from protos.prompt import Message, Shown, chat

if TYPE_CHECKING:
    from cloud.learners.config import Precision
    from tests.jobs.jobs_evidence import shown, spec
else:
    from jobs_evidence import shown, spec

pytestmark = pytest.mark.timeout(900)
FAR = LearnerConfig(method="sft", steps=4, learning_rate=2e-3, anchor_batch=0, layers=(0.5, 1.0))
"""Far enough for products to pay."""
LAX = GateConfig(new_share=0.0, new_gain=-1.0, earlier_loss=1.0, base_kl=1e9, threads=1)
texts = st.text().filter(lambda t: "<|im" not in t)
shown_ones = st.builds(
    Shown,
    st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), texts)).map(tuple),
    texts,
)


@given(
    st.lists(shown_ones).map(tuple),
    st.none() | st.just(Path("/learnt.safetensors")),
    st.builds(LearnerConfig, steps=st.integers(1, 9), learning_rate=st.floats(1e-9, 1)),
)
def test_a_spec_survives_its_file(
    given_: tuple[Shown, ...], learnt: Path | None, learner: LearnerConfig
) -> None:
    whole = spec(train=given_, replay=given_, earlier=given_, learnt=learnt, learner=learner)
    assert Spec.from_json(whole.to_json()) == whole


def real(student: Path, job: Path, **fields: Any) -> Spec:  # noqa: ANN401
    """A spec that can be run, written to its folder."""
    job.mkdir()
    bundle = student / "bundle"
    made = replace(
        spec(masters=student / "masters", base=bundle, current=bundle, gate=LAX), **fields
    )
    (job / "spec.json").write_text(made.to_json())
    return made


def test_a_job_makes_a_student_and_says_what_it_answers(wide_student: Path, tmp_path: Path) -> None:
    job = tmp_path / "0001"
    earlier = (shown("known"),)
    made = real(wide_student, job, learner=FAR, replay=(shown("before"),), earlier=earlier)
    result = adapt.run(job)
    assert json.loads((job / "result.json").read_text()) == result
    assert result["passed"]
    assert [c["name"] for c in result["checks"]] == ["new", "earlier", "base_kl"]
    assert result["student"] == digest(job / "candidate") != digest(made.base)
    assert result["changed_codes"] > 0
    assert (result["update"], result["noise"] < 0.75) == ("products", True)
    assert (job / "learnt.safetensors").exists()
    assert Job(job).updates
    progress = json.loads((job / "progress.json").read_text())
    assert (progress["phase"], progress["fraction"]) == ("done", 1.0)
    candidate = Student.open(job / "candidate", threads=1)
    for canary, asked in zip(result["canaries"], (*made.held_out, *made.earlier), strict=True):
        prompt = chat(candidate.harness.system, asked.messages)
        alone = candidate.answer(prompt, Decoding(max_tokens=candidate.harness.max_tokens))
        assert canary["answer"] == alone.text
    candidate.close()


def refusing(monkeypatch: pytest.MonkeyPatch, times: int) -> list[Verdict]:
    """The gate says what it saw, and refuses so many candidates; all that it was asked."""
    judge, asked = gate.judge, list[Verdict]()

    def strict(*given: Any) -> Verdict:  # noqa: ANN401
        verdict = judge(*given)
        asked.append(verdict)
        if len(asked) <= times:
            checks = tuple(replace(c, passed=False) for c in verdict.checks)
            return replace(verdict, checks=checks)
        return verdict

    monkeypatch.setattr(gate, "judge", strict)
    return asked


def test_where_products_lose_too_much_every_changed_code_is_sent(
    wide_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, 1)
    job = tmp_path / "0001"
    real(wide_student, job, learner=FAR)
    result = adapt.run(job)
    assert result["passed"]
    assert result["update"] == "codes"
    assert result["student"] == digest(job / "candidate")
    assert Job(job).updates == []
    plain = tmp_path / "0002"
    real(wide_student, plain, learner=FAR, delta_share=0.0)
    assert adapt.run(plain)["student"] == result["student"]


def test_a_job_that_no_candidate_passes_is_refused_and_says_what_the_last_one_lacked(
    wide_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = refusing(monkeypatch, 2)
    real(wide_student, tmp_path / "0001", learner=FAR)
    result = adapt.run(tmp_path / "0001")
    assert (result["passed"], result["update"], len(asked)) == (False, "codes", 2)
    assert [c["value"] for c in result["checks"]] == [c.value for c in asked[1].checks]


def test_the_same_spec_gives_the_same_student(tiny_student: Path, tmp_path: Path) -> None:
    students = []
    precisions: list[Precision] = ["fp32", "fp32", "bf16", "bf16"]
    for number, precision in enumerate(precisions):
        job = tmp_path / str(number)
        real(tiny_student, job, learner=replace(FAR, precision=precision))
        result = adapt.run(job)
        assert result["precision"] == precision
        students.append(result["student"])
    assert students[0] == students[1] != students[2] == students[3]


def test_learning_goes_on_from_what_was_learnt_before(tiny_student: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    real(tiny_student, first)
    adapt.run(first)
    second = tmp_path / "second"
    real(tiny_student, second, learnt=first / "learnt.safetensors", current=first / "candidate")
    fresh = tmp_path / "fresh"
    real(tiny_student, fresh)
    changed = {job.name: adapt.run(job)["changed_codes"] for job in (second, fresh)}
    assert changed["second"] > changed["fresh"]


def test_a_demonstration_too_long_to_learn_does_not_stop_the_others(
    tiny_student: Path, tmp_path: Path
) -> None:
    job, endless = tmp_path / "0001", shown("on and on " * 400)
    train, held = (shown("a"), endless, shown("b")), (endless, shown("c"))
    real(tiny_student, job, train=train, held_out=held)
    result = adapt.run(job)
    assert result["left_out"] == [1]
    assert [bool(c["answer"]) for c in result["canaries"]] == [False, True]


def test_only_sdft_leaves_out_what_is_too_long_for_a_teacher_that_is_shown_it_twice(
    tiny_student: Path, tmp_path: Path
) -> None:
    """Once it is some 450 tokens, thrice some 1300: a row holds 1024."""
    long = shown("on and on " * 60)
    train, held = (shown("a"), long), (shown("c"), long)
    left_out = []
    for method in ("sft", "sdft"):
        job = tmp_path / method
        learner = LearnerConfig(method=method, steps=2, batch=2, fallback="ignore")
        real(tiny_student, job, train=train, held_out=held, replay=(long,), learner=learner)
        left_out.append(adapt.run(job)["left_out"])
    assert left_out == [[], [1]]


def test_what_the_steps_did_not_come_to_is_said(tiny_student: Path, tmp_path: Path) -> None:
    job = tmp_path / "0001"
    train = (shown("on and on " * 400), *(shown(t) for t in "abcdef"))
    real(tiny_student, job, train=train, learner=replace(FAR, steps=2, batch=2))
    result = adapt.run(job)
    assert result["left_out"] == [0]
    assert len(result["unseen"]) == 2
    assert 0 not in result["unseen"]


def test_evidence_that_is_all_too_long_is_said_to_be(tiny_student: Path, tmp_path: Path) -> None:
    endless = shown("on and on " * 400)
    real(tiny_student, tmp_path / "0001", held_out=(endless, endless))
    with pytest.raises(TrainingError, match=r"0 held out: need both \(2 more are too long\)"):
        adapt.run(tmp_path / "0001")


@pytest.mark.parametrize("full_from", ["checkpoint.pt", "candidate"])
def test_a_full_disk_stops_a_job_and_the_next_run_goes_on(
    full_from: str,
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job, write = tmp_path / "0001", AtomicFile.write
    real(tiny_student, job, learner=replace(FAR, steps=6, checkpoint_seconds=0.0))

    def full(file: AtomicFile, data: bytes) -> None:
        with storage_errors("writing"):
            if (job / full_from).exists():
                raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(sys, "argv", ["adapt", str(job)])
    with monkeypatch.context() as patched:
        patched.setattr(AtomicFile, "write", full)
        assert adapt.main() == adapt.NO_ROOM
    assert not (job / "result.json").exists()
    assert (job / "checkpoint.pt").exists()
    assert caplog.text.count("progress is not written") == (full_from == "checkpoint.pt")
    with caplog.at_level(logging.INFO):
        assert adapt.main() == 0
    assert "going on after step" in caplog.text
    assert json.loads((job / "result.json").read_text())["steps"] == 6
    assert not (job / "checkpoint.pt").exists()


def test_another_fault_of_the_disk_is_a_failure(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "0001"
    real(tiny_student, job)

    def broken(*_: Any) -> None:  # noqa: ANN401
        with storage_errors("writing the student"):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "argv", ["adapt", str(job)])
    monkeypatch.setattr(adapt, "_judged", broken)
    assert adapt.main() == 1
    assert "Input/output error" in json.loads((job / "result.json").read_text())["error"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_job_whose_log_cannot_be_written_still_says_by_its_code_that_the_disk_is_full(
    tiny_student: Path, tmp_path: Path
) -> None:
    """An orderly exit of the interpreter would end with 120."""
    job = tmp_path / "0001"
    real(tiny_student, job)
    (job / "result.json.tmp").symlink_to("/dev/full")
    with Path("/dev/full").open("wb") as log:
        command = [sys.executable, "-m", "cloud.adapt", str(job)]
        assert subprocess.run(command, stderr=log, check=False).returncode == adapt.NO_ROOM


def test_nothing_to_learn_is_said(tiny_student: Path, tmp_path: Path) -> None:
    real(tiny_student, tmp_path / "0001", train=())
    with pytest.raises(TrainingError, match="0 demonstrations to learn, 2 held out: need both"):
        adapt.run(tmp_path / "0001")


def start(job: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cloud.adapt", str(job)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_job_that_fails_says_why_in_its_result(tiny_student: Path, tmp_path: Path) -> None:
    job = tmp_path / "0001"
    real(tiny_student, job, train=())
    ended = start(job)
    assert ended.returncode == 1
    result = json.loads((job / "result.json").read_text())
    assert not result["passed"]
    assert result["error"].startswith("0 demonstrations to learn")
    assert "Traceback" not in ended.stderr


def test_masters_that_are_gone_are_an_error_that_says_what_to_do(
    tiny_student: Path, tmp_path: Path
) -> None:
    job = tmp_path / "0001"
    real(tiny_student, job, masters=tmp_path / "nowhere")
    ended = start(job)
    assert ended.returncode == 1
    assert "import the student again" in json.loads((job / "result.json").read_text())["error"]
    assert "Traceback" not in ended.stderr


def test_a_fault_that_nobody_foresaw_is_a_result_too(tiny_student: Path, tmp_path: Path) -> None:
    job, masters = tmp_path / "0001", tmp_path / "masters"
    shutil.copytree(tiny_student / "masters", masters)
    (masters / "model.safetensors").write_bytes(b"no weights")
    real(tiny_student, job, masters=masters)
    ended = start(job)
    assert ended.returncode == 1
    result = json.loads((job / "result.json").read_text())
    assert "log.txt" in result["error"]
    assert "Traceback" in ended.stderr


def test_a_job_whose_cloud_is_gone_does_not_begin(tiny_student: Path, tmp_path: Path) -> None:
    job = tmp_path / "0001"
    real(tiny_student, job)
    assert start(job, **{PARENT: "1"}).returncode == 1
    assert not (job / "result.json").exists()
