"""What people and newer releases do to a rollout, and what is kept of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cloud.rollout.events import (
    Abort,
    Gone,
    Outcome,
    Pause,
    Publish,
    Restarted,
    Resume,
    Seen,
    SetTarget,
    Tick,
)
from cloud.rollout.machine import is_stale
from cloud.rollout.plan import Plan
from cloud.rollout.state import (
    Content,
    Health,
    Phase,
    Wanted,
    dump_device,
    dump_header,
    load,
)
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from tests.rollout.rollout_channel import NEW, NEWER, OLD, Fleet, names
else:
    from rollout_channel import NEW, NEWER, OLD, Fleet, names


def test_the_same_report_twice_counts_once_and_an_older_one_not_at_all() -> None:
    fleet = Fleet("hall", "attic")
    fleet.begin()
    first = fleet.in_order()[0]
    committed = fleet.reports(first, Outcome.COMMITTED)
    before = fleet.state
    assert fleet.does(committed) == []
    assert fleet.state is before
    assert not is_stale(before, committed)
    late = replace(committed, outcome=Outcome.FAILED, sequence=0)
    assert is_stale(before, late)
    fleet.does(late)
    assert fleet.state is before


def test_pausing_tells_no_more_devices_and_resuming_goes_on() -> None:
    fleet = Fleet(*names(3))
    fleet.begin()
    first = fleet.in_order()[0]
    fleet.does(Pause())
    fleet.commits(first)
    assert fleet.told() == {first}
    fleet.does(Resume())
    assert fleet.told() == set(names(3))


def test_failures_halt_while_paused_two_at_once_as_well() -> None:
    fleet = Fleet(*names(3))
    fleet.begin()
    first, second, third = fleet.in_order()
    fleet.commits(first)
    fleet.does(Pause())
    fleet.fails(second, third)
    assert fleet.phase() is Phase.HALTED
    fleet.does(Pause())
    assert fleet.phase() is Phase.HALTED


def test_a_pause_holds_newer_releases_too() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.does(Pause())
    fleet.begin(version=3, student=NEWER)
    assert fleet.phase() is Phase.PAUSED
    assert fleet.told() == set()
    fleet.does(Resume())
    assert fleet.told() == {"hall"}


def test_resuming_after_a_halt_begins_with_another_device() -> None:
    fleet = Fleet(*names(3))
    fleet.begin()
    first, second, _ = fleet.in_order()
    fleet.fails(first)
    fleet.does(Resume())
    assert fleet.phase() is Phase.RUNNING
    assert fleet.told() == {first, second}
    fleet.fails(second)
    assert fleet.phase() is Phase.HALTED


def test_a_device_that_commits_after_it_was_excused_counts_again() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.fails("hall")
    fleet.does(Resume())
    assert fleet.phase() is Phase.RUNNING
    fleet.commits("hall")
    assert fleet.phase() is Phase.DONE


def test_a_newer_release_supersedes_and_devices_wait_for_their_turn() -> None:
    fleet = Fleet(*names(4))
    fleet.begin()
    fleet.commits(fleet.in_order()[0])
    fleet.begin(version=3, student=NEWER)
    assert fleet.state.wave == 0
    assert len(fleet.told()) == 1
    fleet.commits(*fleet.told())
    fleet.commits(*fleet.told())
    assert fleet.phase() is Phase.DONE


def test_reports_about_a_superseded_release_change_only_what_the_device_runs() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.begin(version=3, student=NEWER)
    fleet.reports("hall", Outcome.FAILED, release=2)
    assert fleet.phase() is Phase.RUNNING
    fleet.reports("hall", Outcome.COMMITTED, student=NEW, release=2)
    device = fleet.state.devices["hall"]
    assert (device.health, device.release, device.student) == (Health.UPDATING, 2, NEW)


def test_an_older_release_cannot_begin_and_the_same_begins_once() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    before = fleet.state
    fleet.begin()
    assert fleet.state is before
    with pytest.raises(InvalidInputError, match="publish a newer one"):
        fleet.begin(version=1, student=OLD)


def test_until_its_turn_a_device_gets_the_newest_good_release() -> None:
    fleet = Fleet("hall")
    fleet.begin(version=2)
    fleet.commits("hall")
    fleet.begin(version=3, student=NEWER)
    assert fleet.does(Seen("attic", OLD, 1)) == [SetTarget("attic", 2)]


def test_aborting_asks_for_the_content_of_the_last_good_release() -> None:
    fleet = Fleet(*names(3))
    fleet.begin(version=2)
    while fleet.phase() is not Phase.DONE:
        fleet.commits(*fleet.told())
    fleet.begin(version=3, student=NEWER)
    first = fleet.in_order()[0]
    fleet.commits(first)
    commands = fleet.does(Abort("people complain"))
    assert Publish("home", Content(2, NEW)) in commands
    assert fleet.state.wanted() == Wanted(Content(2, NEW))
    assert {c for c in commands if isinstance(c, SetTarget)} == {
        SetTarget(d, 0) for d in names(3) if d != first
    }
    assert fleet.does(Abort("twice")) == []
    fleet.begin(version=4, student=NEW)
    assert fleet.told() == set(names(3)), "the others run that content: the first gets it at once"
    fleet.commits(first)
    assert fleet.phase() is Phase.DONE
    assert fleet.state.wanted() is None


def test_aborting_a_done_rollout_does_not_make_it_the_good_one() -> None:
    fleet = Fleet("hall")
    fleet.begin(version=2)
    fleet.commits("hall")
    fleet.begin(version=3, student=NEWER)
    fleet.commits("hall")
    assert fleet.phase() is Phase.DONE
    assert fleet.does(Abort("found bad later")) == [Publish("home", Content(2, NEW))]
    fleet.begin(version=4, student=NEW)
    assert fleet.state.stable == Content(2, NEW)


def test_aborting_before_anybody_was_told_brings_nothing_back() -> None:
    fleet = Fleet()
    fleet.begin(devices=("attic",))
    assert fleet.does(Abort("wrong file")) == []


def test_a_device_that_is_ahead_of_the_cloud_is_left_alone() -> None:
    fleet = Fleet("hall")
    fleet.does(Seen("attic", NEWER, 9))
    fleet.begin()
    fleet.commits(*fleet.told())
    assert fleet.phase() is Phase.DONE
    assert fleet.state.target("attic") == 0


def test_the_clouds_own_absence_is_not_the_devices_silence() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.does(Restarted(), after=1e6)
    fleet.does(Tick())
    assert fleet.phase() is Phase.RUNNING
    assert not fleet.state.devices["hall"].online
    fleet.does(Tick(), after=601)
    assert fleet.phase() is Phase.HALTED


def test_state_survives_json_and_damage_is_an_error_that_says_what_to_do() -> None:
    fleet = Fleet(*names(3), plan=Plan(waves=(1, 0.5, "rest")))
    fleet.begin()
    fleet.commits("device-0")
    fleet.begin(version=3, student=NEWER)
    header, devices = dump_header(fleet.state), list(map(dump_device, fleet.state.devices.values()))
    assert load(header, devices) == fleet.state
    for damaged in ("", "[]", header[:-5], header.replace('"schema": 2', '"schema": 3')):
        with pytest.raises(IntegrityError, match="begin the newest release's rollout again"):
            load(damaged, devices)
    with pytest.raises(IntegrityError):
        load(header, [*devices, '{"schema": 1, "name": 3}', "null"])


@pytest.mark.parametrize(
    "plan",
    [
        {"waves": (1,)},
        {"waves": ("rest", "rest")},
        {"waves": (0, "rest")},
        {"waves": (1.5, "rest")},
        {"min_healthy_share": 0.0},
        {"halt_failures": 0},
        {"silence_s": 0.0},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(plan: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        Plan(**plan)  # type: ignore[arg-type] # wrong values are the point


def test_a_resumed_rollout_with_nobody_left_to_try_halts_again() -> None:
    fleet = Fleet("hall", plan=Plan(total_s=3600.0))
    fleet.begin()
    fleet.fails("hall")
    fleet.does(Resume())
    fleet.does(Tick(), after=3599)
    assert fleet.phase() is Phase.RUNNING, "it may still commit"
    fleet.does(Tick(), after=2)
    assert fleet.phase() is Phase.HALTED
    assert "nobody is left to try: all 1 devices failed" in fleet.state.reason
    fleet.does(Resume())
    fleet.does(Seen("attic", OLD, 1))
    fleet.does(Tick(), after=100)
    fleet.commits("attic")
    assert fleet.phase() is Phase.DONE


def test_a_device_that_flaps_when_it_was_excused_does_not_hold_the_rollout_up() -> None:
    fleet = Fleet("hall", plan=Plan(max_flaps=1))
    fleet.begin()
    fleet.fails("hall")
    fleet.does(Resume())
    fleet.does(Gone("hall"))
    fleet.commits("hall")
    fleet.does(Seen("hall", OLD, 1))
    assert fleet.health("hall") is Health.FAILED
    fleet.does(Tick(), after=3601)
    assert fleet.phase() is Phase.HALTED


def test_resuming_does_not_make_a_release_good_that_nobody_took() -> None:
    fleet = Fleet(*names(2), plan=Plan(waves=("rest",)))
    fleet.begin()
    fleet.fails(*names(2))
    fleet.does(Resume())
    assert fleet.phase() is Phase.RUNNING
    fleet.commits(*names(2))
    assert fleet.phase() is Phase.DONE


def test_resuming_a_rollout_that_was_done_is_enough() -> None:
    fleet = Fleet("hall", plan=Plan(waves=("rest",), max_flaps=1, halt_failures=1))
    fleet.begin()
    fleet.commits("hall")
    fleet.does(Seen("hall", OLD, 1))
    assert fleet.phase() is Phase.HALTED
    fleet.does(Resume())
    assert fleet.phase() is Phase.DONE
