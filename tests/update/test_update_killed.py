"""A device that is killed, or whose disk fails, at any call that changes it, ends as it should.

``update_killed.py`` strikes at every call of every transition of the machine's table, and looks at
the lives after. A transition without a scenario that walks it fails here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edge.update.machine import MAX_STEPS, RESTING, TABLE, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.update.update_disk import Fault
else:
    from update_disk import Fault

Strikes = list[dict[str, Any]]
_PARTS = 2  # processes: CI's machines have as many cores
_RAM = Path("/dev/shm")  # noqa: S108 # what was synced is known without waiting for a real disk
_AT = {
    Fault.KILLED: {"open", "write", "fsync", "replace"},
    Fault.FAILS: {"open", "write", "fsync", "replace"},
    Fault.FULL: {"open", "write", "fsync"},
    Fault.POWER_LOST: {"replace"},  # its bytes are synced, its name is not there
    Fault.POWER_LOST_NAMES_KEPT: {"fsync"},  # of the folder
}
"""Calls of each journal write at which each fault must have struck."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not _RAM.is_dir():
        yield tmp_path_factory.mktemp("killed")
        return
    with tempfile.TemporaryDirectory(dir=_RAM) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def told(folder: Path) -> Strikes:
    script = Path(__file__).with_name("update_killed.py")
    processes = []
    for part in range(_PARTS):
        root = folder / str(part)
        root.mkdir()
        with (root / "said").open("w") as said, (root / "errors").open("w") as errors:
            command = [sys.executable, str(script), str(root), str(part), str(_PARTS)]
            processes.append(subprocess.Popen(command, stdout=said, stderr=errors))
    found: Strikes = []
    for part, process in enumerate(processes):
        process.wait()
        assert process.returncode == 0, (folder / str(part) / "errors").read_text()[-3000:]
        lines = (folder / str(part) / "said").read_text().splitlines()
        found.extend(json.loads(line) for line in lines)
    return found


@pytest.fixture(scope="module")
def strikes(told: Strikes) -> Strikes:
    return [line for line in told if "fault" in line]


def wrong(strikes: Strikes) -> str:
    """What ended badly, a line each."""
    keys = ("beginning", "at", "name", "path", "fault", "wrong")
    return "\n".join(" | ".join(str(s[k]) for k in keys) for s in strikes if s["wrong"])


@pytest.mark.parametrize(
    "transition", [f"{state.name} {event.name}" for state, event in TABLE], ids=lambda t: t
)
def test_a_fault_while_a_transition_is_written_ends_well(strikes: Strikes, transition: str) -> None:
    here = [s for s in strikes if s["writing"] == transition]
    for fault in Fault:
        assert {s["name"] for s in here if s["fault"] == fault.name} >= _AT[fault]
    assert not wrong(here)


@pytest.mark.parametrize("state", [s.name for s in State if s is not State.INCONSISTENT])
def test_a_fault_in_the_work_of_a_state_ends_well(strikes: Strikes, state: str) -> None:
    here = [s for s in strikes if s["state"] == state and not s["writing"]]
    assert here or state in ("PROBING", "ROLLING_BACK")  # which only read, but for the journal
    assert not wrong(here)


@pytest.mark.parametrize("state", [s for s in State if s not in RESTING])
def test_a_device_that_is_killed_again_and_again_in_a_state_gets_out_of_it(
    told: Strikes, state: State
) -> None:
    (endured,) = [line for line in told if line.get("endured") == state.name]
    assert endured["wrong"] == ""
    if state is not State.FETCHING:
        assert endured["died"] <= MAX_STEPS


def test_a_fault_before_the_first_journal_and_after_a_report_ends_well(strikes: Strikes) -> None:
    known = {f"{state.name} {event.name}" for state, event in TABLE} | set(State.__members__)
    here = [s for s in strikes if (s["writing"] or s["state"]) not in known]
    assert {"", "reports were taken"} <= {s["writing"] for s in here}
    assert not wrong(here)
