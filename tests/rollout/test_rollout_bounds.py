"""Windows, the limit at once, the penalty box, pins, and what the guard does to a rollout."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cloud.rollout.events import (
    Bring,
    Gone,
    Outcome,
    Pin,
    Publish,
    Resume,
    Seen,
    SetTarget,
    Tick,
    Unbox,
    Unpin,
    Worse,
)
from cloud.rollout.plan import Plan, plan_of
from cloud.rollout.state import Content, Health, Phase, dump_device, dump_header, load
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from tests.rollout.rollout_channel import NEW, NEWER, OLD, Fleet, names
else:
    from rollout_channel import NEW, NEWER, OLD, Fleet, names

MIDNIGHT = 1_800_000_000.0 - 8 * 3600  # UTC
HOUR = 3600.0


def at(hours: float, *devices: str, plan: Plan) -> Fleet:
    """A fleet at so many hours past midnight (UTC)."""
    fleet = Fleet(*devices, plan=plan)
    fleet.now = MIDNIGHT + hours * HOUR
    return fleet


# Windows.


def test_a_device_begins_only_in_a_window_and_goes_on_when_it_closes() -> None:
    fleet = at(1.0, *names(2), plan=Plan(waves=("rest",), windows=("02:00-05:00",)))
    fleet.begin()
    assert fleet.told() == set()
    fleet.does(Tick(), after=HOUR)
    assert fleet.told() == set(names(2))
    fleet.does(Seen("attic", OLD, 1), after=3 * HOUR)
    assert fleet.told() == set(names(2))
    fleet.commits(*names(2))
    assert fleet.phase() is Phase.RUNNING, "attic is online, and its window comes"
    fleet.does(Tick(), after=21 * HOUR)
    fleet.commits("attic")
    assert fleet.phase() is Phase.DONE


def test_a_window_is_in_the_plans_time_zone_and_may_span_midnight() -> None:
    plan = Plan(windows=("23:00-01:00",), time_zone="Asia/Kolkata")  # UTC + 5:30
    fleet = at(17.0, "hall", plan=plan)
    fleet.begin()
    assert fleet.told() == set()
    fleet.does(Tick(), after=0.6 * HOUR)
    assert fleet.told() == {"hall"}


def test_a_wave_that_a_window_holds_back_is_neither_through_nor_lost() -> None:
    plan = Plan(waves=(4, "rest"), min_healthy_share=0.7, windows=("02:00-02:10",))
    fleet = at(2.0, *names(2), plan=plan)
    fleet.begin()
    for name in ("attic", "cellar"):
        fleet.does(Seen(name, OLD, 1), after=HOUR)
    fleet.commits(names(2)[0])
    fleet.fails(names(2)[1])
    assert (fleet.phase(), fleet.state.wave) == (Phase.RUNNING, 0), "three of four may still commit"
    fleet.does(Tick(), after=22.1 * HOUR)
    fleet.commits("attic", "cellar")
    assert fleet.state.wave == 1


def test_until_its_window_a_device_is_told_of_no_older_release_either() -> None:
    fleet = at(2.5, "hall", plan=Plan(windows=("02:00-03:00",)))
    fleet.begin(version=2)
    fleet.commits("hall")
    fleet.begin(version=3, student=NEWER)
    fleet.does(Seen("attic", OLD, 1), after=HOUR)
    assert fleet.state.target("attic") == 0


def test_after_a_halt_devices_begin_anew_and_only_in_a_window() -> None:
    plan = Plan(waves=("rest",), windows=("02:00-03:00",), halt_failures=1, min_healthy_share=0.1)
    fleet = at(2.0, *names(3), plan=plan)
    fleet.begin()
    fleet.fails(names(3)[0])
    assert fleet.phase() is Phase.HALTED
    fleet.does(Resume(), after=4 * HOUR)
    assert fleet.told() == {names(3)[0]}, "it failed, and tries no more by itself"
    fleet.does(Tick(), after=20 * HOUR)
    assert fleet.told() == set(names(3))


# How many at once.


def test_no_more_devices_update_at_once_than_the_plan_allows() -> None:
    fleet = Fleet(*names(10), plan=Plan(waves=(1, "rest"), max_updating=3))
    fleet.begin()
    seen = []
    while fleet.phase() is Phase.RUNNING:
        updating = [d.name for d in fleet.state.devices.values() if d.health is Health.UPDATING]
        seen.append(len(updating))
        fleet.commits(updating[0])
    assert fleet.phase() is Phase.DONE
    assert max(seen) == 3
    assert all(d.health is Health.COMMITTED for d in fleet.state.devices.values())


def test_a_limit_does_not_make_a_wave_fail_early_nor_pass_early() -> None:
    plan = Plan(waves=(10, "rest"), max_updating=1, min_healthy_share=0.5, halt_failures=9)
    fleet = Fleet(*names(20), plan=plan)
    fleet.begin()
    for number in range(10):
        (one,) = (d.name for d in fleet.state.devices.values() if d.health is Health.UPDATING)
        assert fleet.state.wave == 0
        fleet.reports(one, Outcome.FAILED if number < 5 else Outcome.COMMITTED)
        assert fleet.phase() is Phase.RUNNING
    assert fleet.state.wave == 1


def test_devices_that_run_the_release_already_need_no_turn() -> None:
    fleet = Fleet(*names(5), plan=Plan(waves=("rest",), max_updating=1))
    fleet.begin(student=OLD)
    assert fleet.phase() is Phase.DONE


# The penalty box.


def chronic(plan: Plan) -> Fleet:
    """A fleet whose hall failed the last two releases, and its others did not."""
    fleet = Fleet("hall", "attic", "cellar", plan=plan)
    for version in (2, 3):
        fleet.begin(version=version, student=f"{version:064x}")
        fleet.commits("attic", "cellar")
        fleet.fails("hall")
        assert fleet.phase() is Phase.DONE
    return fleet


BOX = Plan(
    waves=("rest",), min_healthy_share=0.5, halt_failures=2, box_failures=2, box_s=1000.0
)  # fmt: skip


def test_a_device_that_fails_again_and_again_is_set_aside_and_counts_in_no_rollout() -> None:
    fleet = chronic(BOX)
    assert fleet.state.devices["hall"].boxed_until == fleet.now + 1000.0
    fleet.begin(version=4, student=NEWER)
    assert fleet.told() == {"attic", "cellar"}
    fleet.commits("attic", "cellar")
    assert fleet.phase() is Phase.DONE
    assert fleet.state.target("hall") == 0
    assert fleet.does(Tick(), after=1000.0) == [SetTarget("hall", 4)], "its time is over"


def test_each_failure_more_sets_it_aside_for_twice_as_long_and_a_clean_update_makes_up() -> None:
    fleet = chronic(BOX)
    fleet.begin(version=4, student=NEWER)
    fleet.commits("attic", "cellar")
    fleet.does(Tick(), after=1000.0)
    fleet.fails("hall")
    assert fleet.state.devices["hall"].boxed_until == fleet.now + 2000.0
    fleet.does(Tick(), after=2001.0)
    fleet.begin(version=5, student="55" * 32)
    fleet.commits("hall", "attic", "cellar")
    fleet.begin(version=6, student="66" * 32)
    assert fleet.state.devices["hall"].strikes == 0


def test_a_failure_counts_in_its_own_rollout_also_when_it_leads_to_the_box() -> None:
    """Else a bad release would clear its own record."""
    plan = replace(BOX, box_failures=1, halt_failures=3, waves=(1, "rest"))
    fleet = Fleet(*names(8), plan=plan)
    fleet.begin()
    first = fleet.in_order()[0]
    fleet.fails(first)
    assert fleet.state.devices[first].boxed_until
    assert fleet.phase() is Phase.HALTED


def test_a_device_that_flaps_is_told_nothing_while_it_is_in_the_box() -> None:
    plan = replace(BOX, box_failures=1, max_flaps=1, halt_failures=9)
    fleet = Fleet("hall", "attic", "cellar", plan=plan)
    fleet.begin()
    fleet.commits("hall", "attic", "cellar")
    assert fleet.does(Seen("hall", OLD, 1)) == [SetTarget("hall", 0)]


def test_a_rollout_whose_only_device_is_in_the_box_waits_for_it() -> None:
    fleet = Fleet("hall", plan=replace(BOX, box_failures=1))
    fleet.begin()
    fleet.fails("hall")
    fleet.begin(version=3, student=NEWER)
    fleet.does(Tick(), after=900.0)
    assert (fleet.phase(), fleet.told()) == (Phase.RUNNING, set())
    fleet.does(Tick(), after=200.0)
    fleet.commits("hall")
    assert fleet.phase() is Phase.DONE


def test_a_person_takes_a_mended_device_out_of_the_box() -> None:
    fleet = chronic(BOX)
    fleet.begin(version=4, student=NEWER)
    assert fleet.does(Unbox("hall")) == [SetTarget("hall", 4)]
    assert fleet.state.devices["hall"].strikes == 0


# Pins.


def test_a_pinned_device_stays_and_holds_nothing_up() -> None:
    fleet = Fleet(*names(3))
    fleet.begin()
    first = fleet.in_order()[0]
    fleet.does(Pin(first, 1))
    assert first not in fleet.told()
    fleet.commits(*fleet.told())
    fleet.commits(*fleet.told())
    assert fleet.phase() is Phase.DONE
    assert fleet.state.target(first) == 1
    fleet.begin(version=3, student=NEWER)
    assert fleet.state.devices[first].pinned == 1
    fleet.commits(*(d for d in names(3) if d != first))
    assert fleet.phase() is Phase.DONE
    assert fleet.does(Unpin(first)) == [SetTarget(first, 3)]


def test_a_pinned_device_that_is_behind_is_taken_to_its_release() -> None:
    fleet = Fleet("hall", "attic")
    fleet.begin()
    fleet.commits(*fleet.in_order())
    fleet.does(Seen("cellar", OLD, 1))
    fleet.does(Gone("cellar"))
    fleet.begin(version=3, student=NEWER)
    fleet.does(Pin("cellar", 2))
    fleet.does(Seen("cellar", OLD, 1))
    assert fleet.state.target("cellar") == 2
    fleet.reports("cellar", Outcome.COMMITTED, student=NEW, release=2)
    assert fleet.state.target("cellar") == 2


@pytest.mark.parametrize(
    ("device", "release", "said"),
    [
        ("nobody", 1, "knows no device"),
        ("hall", 0, "there is no release 0"),
        ("hall", 3, "there is no release 3"),
        ("hall", 1, "never go back"),
    ],
)
def test_a_pin_that_cannot_be_is_refused(device: str, release: int, said: str) -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.commits("hall")
    before = fleet.state
    with pytest.raises(InvalidInputError, match=said):
        fleet.does(Pin(device, release))
    assert fleet.state is before


# The guard, and what a person wants brought back.


def test_the_guard_halts_a_release_once_and_not_when_it_is_done() -> None:
    fleet = Fleet(*names(3), plan=Plan(soak_s=60.0))
    fleet.begin()
    first = fleet.in_order()[0]
    fleet.commits(first)
    fleet.does(Worse(1, "an older release"))
    assert fleet.phase() is Phase.RUNNING
    fleet.does(Worse(2, "worse: 14 of 16"))
    assert (fleet.phase(), fleet.state.reason) == (Phase.HALTED, "worse: 14 of 16")
    assert fleet.told() == {first}, "it runs the release; nobody else is told"
    fleet.does(Resume())
    fleet.does(Worse(2, "worse: 20 of 32"))
    assert fleet.phase() is Phase.RUNNING, "a person has seen it, and decided"
    fleet.begin(version=3, student=NEWER)
    fleet.commits(fleet.in_order()[0])
    fleet.does(Tick(), after=61.0)
    fleet.commits(*names(3))
    fleet.does(Tick(), after=61.0)
    assert fleet.phase() is Phase.DONE
    fleet.does(Worse(3, "worse"))
    assert fleet.phase() is Phase.DONE, "what people dislike now is drift"


def test_a_rollback_is_possible_in_every_phase_and_outlives_a_restart() -> None:
    for halted in (False, True):
        fleet = Fleet(*names(2))
        fleet.begin()
        fleet.commits(*names(2))
        fleet.begin(version=3, student=NEWER)
        if halted:
            fleet.fails(fleet.in_order()[0])
        commands = fleet.does(Bring(Content(2, NEW), gives_up=True, reason="complaints"))
        assert Publish("home", Content(2, NEW)) in commands
        assert fleet.phase() is Phase.ABORTED
        again = load(dump_header(fleet.state), map(dump_device, fleet.state.devices.values()))
        assert again == fleet.state
        fleet.begin(version=4, student=NEW)
        assert fleet.state.wanted() is None


def test_a_release_of_learning_in_between_does_not_swallow_an_order() -> None:
    fleet = Fleet(*names(2))
    fleet.begin()
    plan = Plan(waves=("rest",))
    fleet.does(Bring(Content(1, OLD), gives_up=True, reason="x", plan=plan))
    fleet.begin(version=3, student=NEWER)
    wanted = fleet.state.wanted()
    assert wanted is not None
    assert wanted.content == Content(1, OLD)
    fleet.begin(version=4, student=OLD)
    assert (fleet.state.wanted(), fleet.state.plan) == (None, plan)


def test_what_is_not_older_cannot_be_rolled_back_to() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    for version, gives_up in ((2, True), (3, False), (0, False)):
        with pytest.raises(InvalidInputError, match="none that can be brought back"):
            fleet.does(Bring(Content(version, NEW), gives_up=gives_up, reason="x"))


@pytest.mark.parametrize(
    "values",
    [
        {"max_updating": -1},
        {"windows": ["2:00-5:00"]},
        {"windows": ["02:00-24:00"]},
        {"windows": "02:00-05:00"},
        {"windows": [2]},
        {"time_zone": "Mars/Olympus"},
        {"time_zone": ""},
        {"box_s": 0.0},
        {"box_failures": 0},
        {"guard_error": 0.6},
        {"guard_margin": 1.0},
        {"silence_s": "600"},
        {"halt_failures": True},
        {"wave": [1, "rest"]},
    ],
)
def test_bounds_that_make_no_sense_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        plan_of(values)
