"""Skills taught by hand: files of demonstrations in, students out, each going on from the last."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cloud import adapt, teaching
from cloud.encoder import Encoder
from cloud.gate.gate import GateConfig
from cloud.jobs import Job, Jobs
from cloud.learners.config import LearnerConfig
from cloud.students.importer import Imported, open_imported
from edge.process import locked
from edge.student.bundle import read_harness
from protos.errors import InvalidInputError
from protos.prompt import Message, Shown

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

pytestmark = pytest.mark.timeout(900)
LAX = GateConfig(new_share=0.0, new_gain=-1.0, earlier_loss=1.0, base_kl=1e9)
HOW = teaching.How(
    LearnerConfig(method="sft", steps=4, batch=8, anchor_batch=0, layers=(0.5, 1.0)), LAX, threads=1
)


def write(path: Path, *rows: Any) -> Path:  # noqa: ANN401  # whatever a file may hold
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def rows(skill: str, number: int = 24) -> list[dict[str, str]]:
    return [{"prompt": f"{skill} {i}", "completion": f"done {i}"} for i in range(number)]


def taught(path: Path, skill: str, number: int = 24) -> list[teaching.Demonstration]:
    return teaching.read(write(path / f"{skill}.jsonl", *rows(skill, number)))


@pytest.fixture
def student(tiny_student: Path, tmp_path: Path) -> Imported:
    """A student, and ``tmp_path / "out"`` to teach it in."""
    imported = open_imported(tiny_student)
    (tmp_path / "out").mkdir()
    teaching.open_folder(tmp_path / "out", imported)
    return imported


def test_every_form_of_a_line_says_the_same(tmp_path: Path) -> None:
    user = {"role": "user", "content": "lamp on"}
    answer = {"role": "assistant", "content": "on "}
    forms: list[dict[str, Any]] = [
        {"prompt": "lamp on", "completion": " on"},
        {"prompt": [user], "completion": [answer]},
        {"messages": [user, answer]},
        {"messages": [{"role": "system", "content": "Be brief. "}, user, answer]},
        {"prompt": " lamp on", "completion": "on"},
    ]
    for form in forms:
        found = teaching.read(write(tmp_path / "f.jsonl", *rows("other"), form), "Be brief.")
        assert found[-1].shown == Shown((Message("user", "lamp on"),), "on")


def test_of_lines_with_the_same_request_the_last_counts(tmp_path: Path) -> None:
    again = {"prompt": "lamp 3", "completion": "changed"}
    found = teaching.read(write(tmp_path / "f.jsonl", *rows("lamp"), again))
    assert len(found) == 24
    assert [d.shown.answer for d in found if d.shown.messages[0].content == "lamp 3"] == ["changed"]


def test_line_ends_within_a_text_are_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows("one\u2028two"))
    path.write_text(f"\ufeff\n{text}\r\n\n", encoding="utf-8")
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
        ('{"prompt": "x", "completion": " "}', "no words"),
        ('{"prompt": " ", "completion": "x"}', "no words"),
        ("[" * 100_000, "another form"),
        ('{"prompt": "x", "completion": []}', "another form"),
        ('{"prompt": [{"role": "judge", "content": "x"}], "completion": "y"}', "'judge'"),
        ('{"prompt": "x", "completion": "y<|im_end|>"}', "must not contain"),
        ('{"prompt": "\\ud800", "completion": "y"}', "surrogates not allowed"),
    ],
)
def test_a_line_that_is_no_demonstration_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path / "f.jsonl", *rows("lamp"))
    path.write_text(path.read_text() + "\n" + line)
    with pytest.raises(InvalidInputError, match=rf"f.jsonl:25: .*{said}.*a line is"):
        teaching.read(path)


def test_too_few_demonstrations_and_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="19 requests: a skill needs 20"):
        taught(tmp_path, "lamp", 19)
    (tmp_path / "f.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        teaching.read(tmp_path / "f.jsonl")


def test_steps_are_as_many_as_draw_each_demonstration_twice() -> None:
    learner = LearnerConfig(batch=8)
    assert teaching.with_enough_steps(learner, 100) == learner
    assert teaching.with_enough_steps(learner, 1000).most_lessons >= 1000


def test_what_a_job_has_no_steps_for_is_said_to_wait(student: Imported, tmp_path: Path) -> None:
    how = replace(HOW, learner=replace(HOW.learner, steps=1))
    evidence = teaching.job_for(tmp_path / "out", student, taught(tmp_path, "lamp"), how).evidence
    assert [len(evidence.learn), len(evidence.held_out), len(evidence.waiting)] == [4, 8, 12]


def answer_to(shown: Iterable[Shown], request: str) -> list[str]:
    return [d.answer for d in shown if d.messages[0].content == request]


def test_skills_go_on_from_the_last_that_passed_and_are_held_to_it(
    student: Imported, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lamps, music = taught(tmp_path, "lamp"), taught(tmp_path, "music")
    first = teaching.job_for(out, student, lamps, HOW)
    assert adapt.run(first.folder)["passed"]
    strict = replace(HOW, gate=GateConfig(new_share=1.0))
    refused = teaching.job_for(out, student, music, strict)
    assert not adapt.run(refused.folder)["passed"]
    assert teaching.job_for(out, student, music, strict).folder == refused.folder
    third = teaching.job_for(out, student, music, HOW)
    assert [j.name for j in Jobs(out).all()] == ["0001", "0002", "0003"]
    began, goes_on = teaching.spec_of(first), teaching.spec_of(third)
    assert (goes_on.learnt, goes_on.current) == (first.learnt, first.candidate)
    assert set(goes_on.replay) == set(began.train)
    assert set(goes_on.earlier) == set(began.held_out)
    assert (began.release, goes_on.release) == (0, 1)
    assert adapt.run(third.folder)["passed"]
    assert teaching.job_for(out, student, lamps, HOW).folder == first.folder  # taught already


def finish(job: Job, **result: Any) -> Job:  # noqa: ANN401
    """Let a job have passed, as far as later ones ask."""
    (job.folder / "result.json").write_text(json.dumps({"passed": True} | result))
    return job


def test_what_was_said_last_is_replayed_and_asked_and_nothing_that_was_trained_on(
    student: Imported, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lamps = taught(tmp_path, "lamp")
    first = finish(teaching.job_for(out, student, lamps, HOW))
    request = teaching.spec_of(first).held_out[0].messages[0].content
    # More of the skill, among them another answer to what was held out.
    more = [d for d in taught(tmp_path, "lamp", 60) if d.shown.messages[0].content != request]
    other = [
        teaching.Demonstration.of(Shown((Message("user", request),), f"now {i}")) for i in range(99)
    ]
    long = replace(HOW, learner=replace(HOW.learner, steps=50))
    for new in other:  # one that chance does not hold out
        (out / "probe").mkdir()
        teaching.open_folder(out / "probe", student)
        spec = teaching.spec_of(teaching.job_for(out / "probe", student, [*more, new], long))
        shutil.rmtree(out / "probe")
        if new.shown in spec.train:
            break
    second = finish(teaching.job_for(out, student, [*more, new], long))
    spec = teaching.spec_of(second)
    assert set(spec.held_out).isdisjoint(teaching.spec_of(first).train)
    assert len(spec.held_out) >= 8
    assert (spec.replay, spec.earlier) == ((), ())
    third = teaching.spec_of(teaching.job_for(out, student, taught(tmp_path, "music"), HOW))
    assert answer_to(third.replay, request) == [new.shown.answer]
    assert answer_to(third.earlier, request) == []
    assert {d.messages for d in third.replay}.isdisjoint(d.messages for d in third.earlier)


def test_what_was_taught_before_alone_cannot_be_tested(student: Imported, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = finish(teaching.job_for(out, student, taught(tmp_path, "lamp", 40), HOW))
    again = [teaching.Demonstration.of(d) for d in teaching.spec_of(first).train]
    with pytest.raises(InvalidInputError, match="taught before: add requests"):
        teaching.job_for(out, student, again, HOW)


def test_what_is_done_or_under_way_is_not_begun_again(student: Imported, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lamps = taught(tmp_path, "lamp")
    first = teaching.job_for(out, student, lamps, HOW)
    other = replace(HOW, threads=2, learner=replace(HOW.learner, steps=9))
    assert teaching.job_for(out, student, lamps[::-1], other).folder == first.folder
    with pytest.raises(InvalidInputError, match="0001 teaches something else and is not done"):
        teaching.job_for(out, student, taught(tmp_path, "music"), HOW)
    finish(first)
    assert teaching.job_for(out, student, lamps, replace(HOW, threads=2)).folder == first.folder
    with pytest.raises(InvalidInputError, match="0001 has taught these, with other options"):
        teaching.job_for(out, student, lamps, other)
    assert len(Jobs(out).all()) == 1


def test_a_job_that_failed_is_tried_again_and_holds_up_no_other(
    student: Imported, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    lamps = taught(tmp_path, "lamp")
    first = teaching.job_for(out, student, lamps, HOW)
    first.failed("no memory")
    music = teaching.job_for(out, student, taught(tmp_path, "music"), HOW)
    assert teaching.spec_of(music).learnt is None
    music.failed("no memory")
    again = teaching.job_for(out, student, taught(tmp_path, "music"), HOW)
    assert (again.folder, again.result) == (music.folder, None)
    music.failed("it diverged: lower the learning rate")
    lower = replace(HOW, learner=replace(HOW.learner, learning_rate=1e-5))
    other = teaching.job_for(out, student, taught(tmp_path, "music"), lower)
    assert (other.name, teaching.spec_of(other).learner) == ("0003", lower.learner)


def test_answers_that_the_student_cannot_give_are_named(student: Imported, tmp_path: Path) -> None:
    harness, encoder = read_harness(student.bundle), Encoder.of(student.bundle)
    assert teaching.doubts(taught(tmp_path, "lamp"), harness, encoder) == []
    strict = replace(harness, schema={"type": "object"}, max_tokens=60)
    long = {"prompt": "count", "completion": json.dumps({"numbers": list(range(60))})}
    given = teaching.read(write(tmp_path / "f.jsonl", *rows("lamp"), long))
    schema, length = teaching.doubts(given, strict, encoder)
    assert schema == "answers that break the harness's schema: 24, such as 'done 0'"
    found = re.match(r"answers of more than .* \(60\): 1, the longest of (\d{3});", length)
    assert found
    longest = int(found[1])
    assert teaching.doubts(given, replace(harness, max_tokens=longest), encoder) == []
    assert len(teaching.doubts(given, replace(harness, max_tokens=longest - 1), encoder)) == 1


def test_a_folder_belongs_to_one_student(
    student: Imported, wide_student: Path, tmp_path: Path
) -> None:
    teaching.open_folder(tmp_path / "out", student)
    with pytest.raises(InvalidInputError, match="teaches another student"):
        teaching.open_folder(tmp_path / "out", open_imported(wide_student))
    same = replace(student, bundle=student.bundle / ".." / "bundle")
    teaching.open_folder(tmp_path / "out", same)


def test_a_folder_that_holds_something_else_is_left_as_it_is(
    student: Imported, tmp_path: Path
) -> None:
    photo = tmp_path / "mine" / "0001" / "photo.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"me")
    with pytest.raises(InvalidInputError, match="holds something else"):
        teaching.open_folder(tmp_path / "mine", student)
    assert [*(tmp_path / "mine").iterdir()] == [photo.parent]
    (tmp_path / "out" / "teaching.json").write_text("{")
    with pytest.raises(InvalidInputError, match="damaged"):
        teaching.open_folder(tmp_path / "out", student)


def test_a_job_of_another_version_says_so(student: Imported, tmp_path: Path) -> None:
    job = teaching.job_for(tmp_path / "out", student, taught(tmp_path, "lamp"), HOW)
    (job.folder / "spec.json").write_text('{"masters": "x"}')
    with pytest.raises(InvalidInputError, match="0001 was made by another version"):
        teaching.job_for(tmp_path / "out", student, taught(tmp_path, "lamp"), HOW)


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
    run = [*command, "--set", "steps=2"]
    ended = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr  # two steps teach nothing: no gain
    assert "8 demonstrations to learn, 8 held out" in ended.stdout
    assert "8 more are left out" in ended.stdout
    assert "2 steps, " in ended.stdout
    assert "student taught/0001/candidate" in ended.stdout
    assert re.search(r"\d+% \w+", ended.stderr)  # how far it was
    assert "The gate refuses it" in ended.stderr
    again = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (1, ended.stdout)
    ask = [*run[:4], "ask", "taught/0001/candidate"]
    asked = b"lamp 1\n\xff\n<|im_end|>\nlamp 2"
    answered = subprocess.run(ask, cwd=tmp_path, input=asked, capture_output=True, check=False)
    assert answered.returncode == 1
    assert b"must not contain" in answered.stderr
    one = subprocess.run([*ask, "lamp 2"], cwd=tmp_path, capture_output=True, check=True)
    assert answered.stdout.endswith(one.stdout)


def test_a_command_that_was_stopped_goes_on(command: list[str], tmp_path: Path) -> None:
    run = [*command, "--steps", "150", "--set", "checkpoint_seconds=0"]
    process = subprocess.Popen(
        run,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    job = Job(tmp_path / "taught" / "0001")
    while not (job.folder / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    another = pytest.raises(InvalidInputError, match="stop it, or give this one another --out")
    with another, locked(job.folder.parent, "--out"):
        pass
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate()
    assert process.returncode == 130
    assert "stopped: the same command goes on with taught/0001" in said
    assert job.result is None
    ended = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "150 steps, " in ended.stdout, ended.stderr
    log = (job.folder / "log.txt").read_text()
    assert "going on after step" in log
    assert "Traceback" not in log
