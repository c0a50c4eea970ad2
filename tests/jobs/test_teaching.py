"""Skills taught by hand: files of demonstrations in, students out, each going on from the last."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cloud import adapt, teaching
from cloud.adapt import Spec
from cloud.gate.gate import GateConfig
from cloud.jobs import Job, Jobs
from cloud.learners.config import LearnerConfig
from cloud.students.importer import Imported, open_imported
from protos.errors import InvalidInputError
from protos.prompt import Message, Shown

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(900)
LAX = GateConfig(new_share=0.0, new_gain=-1.0, earlier_loss=1.0, base_kl=1e9)
HOW = teaching.How(
    LearnerConfig(method="sft", steps=4, batch=8, anchor_batch=0, layers=(0.5, 1.0)), LAX, threads=1
)


def write(path: Path, *rows: Any) -> Path:  # noqa: ANN401  # whatever a file may hold
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def rows(skill: str, number: int = 12) -> list[dict[str, str]]:
    return [{"prompt": f"{skill} {i}", "completion": f"done {i}"} for i in range(number)]


def taught(path: Path, skill: str, number: int = 12) -> list[teaching.Demonstration]:
    return teaching.read(write(path / f"{skill}.jsonl", *rows(skill, number)))


def spec_of(job: Job) -> Spec:
    return Spec.from_json((job.folder / "spec.json").read_text())


@pytest.fixture
def student(tiny_student: Path) -> Imported:
    return open_imported(tiny_student)


def test_every_form_of_a_line_says_the_same(tmp_path: Path) -> None:
    user = {"role": "user", "content": "lamp on"}
    answer = {"role": "assistant", "content": "on "}
    forms: list[dict[str, Any]] = [
        {"prompt": "lamp on", "completion": " on"},
        {"prompt": [user], "completion": [answer]},
        {"messages": [user, answer]},
    ]
    for form in forms:
        found = teaching.read(write(tmp_path / "f.jsonl", *rows("other", 10), form))
        assert found[-1].shown == Shown((Message("user", "lamp on"),), "on")


def test_of_lines_with_the_same_request_the_last_counts(tmp_path: Path) -> None:
    again = {"prompt": "lamp 3", "completion": "changed"}
    found = teaching.read(write(tmp_path / "f.jsonl", *rows("lamp"), again))
    assert len(found) == 12
    assert [d.shown.answer for d in found if d.shown.messages[0].content == "lamp 3"] == ["changed"]


def test_line_ends_within_a_text_are_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows("one\u2028two"))
    path.write_text(f"\n{text}\r\n\n", encoding="utf-8")
    assert teaching.read(path)[0].shown.messages[0].content == "one\u2028two 0"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x"}', "'completion' is missing"),
        ("{", "Expecting property name"),
        ("[1]", "another form"),
        ("null", "another form"),
        ('{"messages": []}', "another form"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to answer"),
        ('{"prompt": "x", "completion": " "}', "have words"),
        ('{"prompt": "x", "completion": []}', "another form"),
        ('{"prompt": [{"role": "judge", "content": "x"}], "completion": "y"}', "'judge'"),
        ('{"prompt": "x", "completion": "y<|im_end|>"}', "must not contain"),
        ('{"prompt": "\\ud800", "completion": "y"}', "surrogates not allowed"),
    ],
)
def test_a_line_that_is_no_demonstration_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path / "f.jsonl", *rows("lamp"))
    path.write_text(path.read_text() + "\n" + line)
    with pytest.raises(InvalidInputError, match=rf"f.jsonl:13: .*{said}.*a line is"):
        teaching.read(path)


def test_too_few_demonstrations_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="9 requests: a skill needs 10"):
        taught(tmp_path, "lamp", 9)
    (tmp_path / "f.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        teaching.read(tmp_path / "f.jsonl")


def test_steps_are_as_many_as_draw_each_demonstration_twice() -> None:
    learner = LearnerConfig(batch=8)
    assert teaching.with_steps(learner, 100, None).steps == learner.steps
    more = teaching.with_steps(learner, 1000, None)
    assert more.most_lessons >= 1000
    assert teaching.with_steps(learner, 1000, 9).steps == 9


def test_what_a_job_has_no_steps_for_is_said_to_wait(student: Imported, tmp_path: Path) -> None:
    how = replace(HOW, learner=replace(HOW.learner, steps=1))
    evidence = teaching.job_for(tmp_path, student, taught(tmp_path, "lamp", 40), how).evidence
    assert [len(evidence.learn), len(evidence.held_out), len(evidence.waiting)] == [4, 8, 28]


def test_skills_go_on_from_the_last_that_passed_and_are_held_to_it(
    student: Imported, tmp_path: Path
) -> None:
    lamps, music = taught(tmp_path, "lamp"), taught(tmp_path, "music")
    first = teaching.job_for(tmp_path, student, lamps, HOW)
    assert adapt.run(first.folder)["passed"]
    strict = replace(HOW, gate=GateConfig(new_share=1.0))
    refused = teaching.job_for(tmp_path, student, music, strict)
    assert not adapt.run(refused.folder)["passed"]
    third = teaching.job_for(tmp_path, student, music, HOW)
    assert [j.name for j in Jobs(tmp_path).all()] == ["0001", "0002", "0003"]
    began, goes_on = spec_of(first), spec_of(third)
    assert (goes_on.learnt, goes_on.current) == (first.learnt, first.candidate)
    assert set(goes_on.replay) == set(began.train)
    assert set(goes_on.earlier) == set(began.held_out)
    assert (began.release, goes_on.release) == (0, 1)
    assert adapt.run(third.folder)["passed"]
    # The same again, with another answer to what was learnt or tested before: nothing old is held.
    changed = [replace(d, shown=replace(d.shown, answer="new")) for d in lamps]
    fourth = spec_of(teaching.job_for(tmp_path, student, changed, HOW))
    assert {d.messages[0].content.split()[0] for d in (*fourth.replay, *fourth.earlier)} == {
        "music"
    }


def test_what_is_done_or_under_way_is_not_begun_again(student: Imported, tmp_path: Path) -> None:
    lamps = taught(tmp_path, "lamp")
    first = teaching.job_for(tmp_path, student, lamps, HOW)
    assert teaching.job_for(tmp_path, student, lamps[::-1], HOW).folder == first.folder
    with pytest.raises(InvalidInputError, match="0001 is not done and teaches something else"):
        teaching.job_for(tmp_path, student, taught(tmp_path, "music"), HOW)
    adapt.run(first.folder)
    assert teaching.job_for(tmp_path, student, lamps, HOW).folder == first.folder
    assert len(Jobs(tmp_path).all()) == 1


def test_a_folder_belongs_to_one_student(
    student: Imported, wide_student: Path, tmp_path: Path
) -> None:
    lamps = taught(tmp_path, "lamp")
    teaching.job_for(tmp_path, student, lamps, HOW)
    with pytest.raises(InvalidInputError, match="give another --out"):
        teaching.job_for(tmp_path, open_imported(wide_student), lamps, HOW)


@pytest.fixture
def command(tiny_student: Path, tmp_path: Path) -> list[str]:
    write(tmp_path / "lamp.jsonl", *rows("lamp"))
    options = ["--student", str(tiny_student), "--out", "taught", "--threads", "1"]
    gate = ["--min-new", "0", "--max-base-kl", "1e9"]
    run = [sys.executable, "-m", "cloud.cli", "student", "teach", "lamp.jsonl"]
    return [*run, *options, *gate, "--learner", "sft"]


def test_a_refused_student_is_shown_with_why_and_asked_all_the_same(
    command: list[str], tmp_path: Path
) -> None:
    run = [*command, "--steps", "2"]
    ended = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr  # two steps teach nothing: no gain
    assert "4 demonstrations to learn, 8 held out" in ended.stdout
    assert "student taught/0001/candidate" in ended.stdout
    assert "The gate refuses it" in ended.stderr
    again = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "2 steps of sft" in again.stdout
    assert len(Jobs(tmp_path / "taught").all()) == 1
    ask = [*run[:4], "ask", "taught/0001/candidate", "lamp 1"]
    answered = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert answered.stdout.endswith("\n")


def test_a_command_that_was_stopped_goes_on(command: list[str], tmp_path: Path) -> None:
    run = [*command, "--steps", "150", "--set", "checkpoint_seconds=0"]
    process = subprocess.Popen(
        run, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    job = Job(tmp_path / "taught" / "0001")
    while not (job.folder / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "stopped: the same command goes on with taught/0001" in said
    assert job.result is None
    ended = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "150 steps of sft" in ended.stdout, ended.stderr
    assert "going on after step" in (job.folder / "log.txt").read_text()
