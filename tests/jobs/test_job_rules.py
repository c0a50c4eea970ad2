"""Jobs on disk, their processes, and what of them counts later."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from cloud import adapt, jobs
from cloud.jobs import Jobs, Used
from cloud.lessons import Evidence

if TYPE_CHECKING:
    from pathlib import Path

    from tests.jobs.jobs_evidence import shown, spec
else:
    from jobs_evidence import shown, spec


def test_a_job_left_half_written_by_a_crash_is_no_job(tmp_path: Path) -> None:
    found = Jobs(tmp_path)
    assert found.all() == []
    (tmp_path / "0001").mkdir()
    (tmp_path / "0001" / "evidence.json").write_text("{}")
    (tmp_path / "0001" / "spec.json.tmp").write_text("{")
    assert found.all() == []
    job = found.create(spec(), Evidence(("a",), ("b",)))
    assert job.name == "0001"
    assert [p.name for p in sorted(job.folder.iterdir())] == ["evidence.json", "spec.json"]
    assert found.create(spec(), Evidence(("c",), ("d",))).name == "0002"


def test_a_job_says_what_its_files_say(tmp_path: Path) -> None:
    job = Jobs(tmp_path).create(spec(), Evidence(("a",), ("b", "c")))
    assert job.evidence == Evidence(("a",), ("b", "c"))
    assert (job.result, job.progress, job.version) == (None, None, None)
    job.failed("it broke")
    assert job.result == {"passed": False, "error": "it broke"}
    job.published(3)
    assert job.version == 3
    assert Jobs(tmp_path).all()[0].version == 3


def test_only_jobs_count_whose_release_was_not_withdrawn(tmp_path: Path) -> None:
    made = Jobs(tmp_path)
    first, second, third = (made.create(spec(), Evidence((n,), (n + n,))) for n in "abc")
    first.published(2)
    second.published(3)
    third.failed("its gate")
    used, last = jobs.used(made.all(), {1, 2, 3})
    assert used == Used(("a", "b"), ("aa", "bb"))
    assert last is not None
    assert last.name == second.name
    used, last = jobs.used(made.all(), {1, 2, 4})
    assert used == Used(("a",), ("aa",))
    assert jobs.used([], {1}) == (Used(), None)


def test_what_a_job_did_not_come_to_is_free_for_the_next(tmp_path: Path) -> None:
    evidence = Evidence(("a", "b", "c", "d"), ("e",), ("f",))
    job = Jobs(tmp_path).create(spec(), evidence)
    assert job.evidence == evidence
    (job.folder / "result.json").write_text('{"unseen": [0, 2], "left_out": [3]}')
    job.published(2)
    assert jobs.used([job], {2})[0] == Used(("b",), ("e",), ("d",))


def test_evidence_of_jobs_before_any_had_to_wait_is_read(tmp_path: Path) -> None:
    job = Jobs(tmp_path).create(spec(), Evidence((), ()))
    (job.folder / "evidence.json").write_text('{"learn": ["a"], "held_out": ["b"]}')
    assert job.evidence == Evidence(("a",), ("b",))
    assert job.used == Used(("a",), ("b",))


@pytest.mark.parametrize(("code", "tries"), [(adapt.NO_ROOM, [1, 1]), (1, [1, 2])])
def test_a_job_that_a_full_disk_stopped_has_not_failed_and_waits(
    code: int, tries: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5.0
    made = Jobs(tmp_path, clock=lambda: now)
    job = made.create(spec(), Evidence(("a",), ("b",)))
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    ended = ["-c", f"exit {code}"]
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda a, **more: popen([a[0], *ended], **more))
    for count in tries:
        made.start(job)
        assert made.tries[job.name] == count
        while made.running():
            time.sleep(0.01)
    assert made.disk_full == (code == adapt.NO_ROOM)
    now += 700
    assert not made.disk_full


def test_a_job_ends_with_the_one_who_started_it(tmp_path: Path) -> None:
    made = Jobs(tmp_path)
    made.stop()  # nothing runs
    job = made.create(spec(), Evidence(("a",), ("b",)))
    made.start(job)
    assert made.running()
    made.stop()
    assert not made.running()
    assert job.result is None  # it runs again


def test_what_was_too_long_or_not_seen_was_not_learnt() -> None:
    whole = spec()
    assert jobs.learnt(whole, {"left_out": [1], "unseen": [2]}) == [whole.train[0]]
    assert jobs.learnt(whole, {"left_out": [1]}) == [whole.train[0], whole.train[2]]
    assert jobs.learnt(whole, {}) == list(whole.train)


def test_only_right_answers_are_known() -> None:
    whole = spec(held_out=(shown("a"), shown("b")), earlier=(shown("c"),))
    said = {"canaries": [{"answer": a} for a in ("right", "wrong", "right")]}
    assert jobs.answered(whole, said) == [shown("a"), shown("c")]
    with pytest.raises(ValueError, match="zip"):
        jobs.answered(whole, {"canaries": []})
