"""The demo's report: figures from a record of events, held against the bars."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from cloud.demo import plot, report
from cloud.demo.record import Record

if TYPE_CHECKING:
    from pathlib import Path

DEVICES = ("home-a", "home-b")
CHECKS = [{"name": "base_kl", "value": 0.04, "bound": 0.15, "passed": True}]


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(file: Path, *, false_alarm: bool = False, late: int = 20) -> Record:
    """The record of a short demo in which all went well, or not."""
    clock = Clock()
    record = Record(file, clock)
    with record:
        record.add("phase", name="learn")
        record.add("alarm", device="home-a", phase="learn", commands=9)
        for device in DEVICES:
            clock.now += 1
            record.add("swap", device=device, release=2)
        clock.now = 100.0
        record.add("phase", name="steady")
        if false_alarm:
            clock.now = 110.0
            record.add("alarm", device="home-a", phase="steady", commands=10)
        measures = (
            ("a_before", 80),
            ("b_before", 2),
            ("b_memory", 40),
            ("a_after", 78),
            ("b_after", 70),
        )
        for name, right in measures:
            skill = "lights" if name.startswith("a") else "media"
            record.add("measure", name=f"skill_{name}", skill=skill, right=right, count=100)
        clock.now = 200.0
        record.add("phase", name="shift")
        for i in range(40):
            clock.now += 1
            record.add(
                "ask",
                device="home-a",
                phase="shift",
                skill="media",
                right=i > 20,
                seconds=0.5,
                release=2,
            )
        for device in DEVICES:
            record.add("alarm", device=device, phase="shift", commands=late)
        record.add("job", name="0002", state="learning", demonstrations=150)
        clock.now = 400.0
        record.add("job", name="0002", state="done", demonstrations=150)
        record.add("release", version=3)
    return record


def figures(record: Record, changed: dict[str, Any] | None = None) -> report.Numbers:
    """The figures of a record."""
    given: dict[str, Any] = {
        "devices": DEVICES,
        "releases": (2, 3),
        "digests": {"home-a": "d", "home-b": "d", "gate": "d"},
        "results": [{"sdft_seconds": 90.0, "checks": CHECKS}] * 2,
        "demonstrations_used": 150,
        "delta_bytes": 5_000_000,
        "full_bytes": 150_000_000,
        "requests": 900,
        "requests_failed": 0,
        "wall_seconds": 800.0,
    }
    return report.numbers(record, report.Facts(**(given | (changed or {}))))


def test_a_good_run_keeps_every_bar(tmp_path: Path) -> None:
    found = figures(told(tmp_path / "events.jsonl"))
    assert [b.what for b in report.bars(found) if not b.held] == []


def test_the_report_has_the_names_that_scripts_read(tmp_path: Path) -> None:
    names = {
        *("skill_a_before", "skill_a_after", "skill_b_before", "skill_b_memory", "skill_b_after"),
        *("false_alarms_before_shift", "commands_to_alarm", "demonstrations_used", "sdft_seconds"),
        *("delta_bytes", "full_bytes", "digests_equal", "requests_failed", "base_kl"),
        "wall_seconds",
    }
    found = figures(told(tmp_path / "events.jsonl"))
    assert names <= set(found)
    assert (found["skill_a_before"], found["skill_b_memory"]) == (0.8, 0.4)
    json.dumps(found)


def test_an_alarm_before_the_first_release_is_no_false_alarm_but_one_after_it_is(
    tmp_path: Path,
) -> None:
    assert figures(told(tmp_path / "a"))["false_alarms_before_shift"] == 0
    assert figures(told(tmp_path / "b", false_alarm=True))["false_alarms_before_shift"] == 1


def test_the_slowest_device_counts_for_the_alarm_and_a_silent_one_breaks_the_bar(
    tmp_path: Path,
) -> None:
    record = told(tmp_path / "events.jsonl")
    assert figures(record)["commands_to_alarm"] == 20
    silent = figures(record, {"devices": (*DEVICES, "home-c")})
    assert silent["commands_to_alarm"] is None
    assert "alarm on each device within 60 commands" in [
        b.what for b in report.bars(silent) if not b.held
    ]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"requests_failed": 1}, "no request failed"),
        ({"delta_bytes": 9_500_000}, "delta: at most 6% of the full files"),
        ({"wall_seconds": 901.0}, "at most 15 minutes"),
        ({"digests": {"home-a": "d", "gate": "e"}}, "devices run the file the gate judged"),
    ],
)
def test_each_broken_promise_is_named(tmp_path: Path, changed: dict[str, Any], what: str) -> None:
    found = figures(told(tmp_path / "events.jsonl"), changed)
    assert [b.what for b in report.bars(found) if not b.held] == [what]


def test_events_are_on_disk_as_they_happen(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    with Record(file, Clock()) as record:
        record.add("phase", name="learn")
        assert json.loads(file.read_text()) == {"t": 0.0, "kind": "phase", "name": "learn"}


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    plot.draw(told(tmp_path / "events.jsonl"), ("lights", "media"), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
