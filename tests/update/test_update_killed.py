"""A device killed in any state, at any durable step, comes back with a student that serves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edge.update.machine import State

if TYPE_CHECKING:
    from tests.update.update_killed import STATES
    from tests.update.update_simulator import World
else:
    from update_killed import STATES
    from update_simulator import World

Deaths = list[dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def deaths(root: Path) -> Deaths:
    script = Path(__file__).with_name("update_killed.py")
    done = subprocess.run(
        [sys.executable, str(script), str(root)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def entries(deaths: Deaths, root: Path) -> tuple[dict[str, object], dict[str, object]]:
    """The provisioned student, and the release's."""
    del deaths
    old, new = World(root).digests[:2]
    return {"student": old, "release": 0}, {"student": new, "release": 1}


Entries = tuple[dict[str, object], dict[str, object]]


def of(deaths: Deaths, scenario: str, point: str) -> dict[str, Any]:
    return next(d for d in deaths if (d["scenario"], d["point"]) == (scenario, point))


@pytest.mark.parametrize("state", STATES["good"])
def test_an_update_killed_in_a_state_is_finished_after_the_restart(
    deaths: Deaths, entries: Entries, state: str
) -> None:
    death = of(deaths, "good", f"entering {state}")
    assert death["died_in"] == state
    assert death["at_once"] in entries
    assert death["then"] == entries[1]
    assert death["wiped"]


@pytest.mark.parametrize(
    ("scenario", "state"), [(s, x) for s in ("bad probe", "bad commit") for x in STATES[s]]
)
def test_a_failing_update_killed_in_a_state_ends_with_the_old_student(
    deaths: Deaths, entries: Entries, scenario: str, state: str
) -> None:
    death = of(deaths, scenario, f"entering {state}")
    assert death["died_in"] == state
    assert death["at_once"] in entries
    assert death["then"] == entries[0]
    assert death["state"] == "idle"
    assert not death["wiped"]


@pytest.mark.parametrize("state", STATES["bad rollback"])
def test_a_device_killed_without_a_way_back_serves_after_the_restart(
    deaths: Deaths, entries: Entries, state: str
) -> None:
    death = of(deaths, "bad rollback", f"entering {state}")
    assert death["died_in"] == state
    assert death["then"]["student"] in {e["student"] for e in entries}
    assert death["state"] == "idle"


def test_every_state_was_killed(deaths: Deaths) -> None:
    assert {d["died_in"] for d in deaths} == {s.name for s in State}


def test_a_student_that_kills_the_process_in_its_probe_is_given_up(
    deaths: Deaths, entries: Entries
) -> None:
    death = of(deaths, "good", "entering PROBING again and again")
    assert death["then"] == entries[0]


def test_a_commit_that_kills_the_process_for_ever_is_given_up(
    deaths: Deaths, entries: Entries
) -> None:
    death = of(deaths, "good", "entering COMMITTED again and again")
    assert death["then"] in entries
    assert death["state"] == "idle"


def test_killed_at_any_durable_step_the_update_is_finished_after_the_restart(
    deaths: Deaths, entries: Entries
) -> None:
    steps = [d for d in deaths if d["point"].startswith("step")]
    assert len(steps) > 30
    for death in steps:
        assert "error" not in death, death
        assert death["at_once"] in entries, death
        assert death["then"] == entries[1], death
        assert death["wiped"], death
