"""How a rollout goes from wave to wave, and when it halts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud.rollout.events import (
    Gone,
    Outcome,
    Seen,
    SetTarget,
    Tick,
)
from cloud.rollout.plan import Plan
from cloud.rollout.state import (
    Health,
    Phase,
    order,
)

if TYPE_CHECKING:
    from tests.rollout.rollout_channel import NEW, OLD, Fleet, names
else:
    from rollout_channel import NEW, OLD, Fleet, names


def test_the_first_wave_is_the_first_online_device_of_the_stable_order() -> None:
    fleet = Fleet(*names(5))
    expected = sorted(names(5), key=lambda d: order("home", 2, d))
    fleet.does(Gone(expected[0]))
    fleet.begin()
    assert fleet.told() == {expected[1]}
    assert fleet.commands == [SetTarget(expected[1], 2)]


def test_the_rest_follows_when_the_first_has_committed_and_then_the_rollout_is_done() -> None:
    fleet = Fleet(*names(4))
    fleet.begin()
    first = fleet.in_order()[0]
    fleet.commits(first)
    assert fleet.told() == set(names(4))
    assert fleet.phase() is Phase.RUNNING
    fleet.commits(*(set(names(4)) - {first}))
    assert fleet.phase() is Phase.DONE


def test_a_rollout_waits_for_its_first_device_as_long_as_it_takes() -> None:
    fleet = Fleet()
    fleet.begin(devices=("attic",))
    fleet.does(Tick(), after=1e6)
    assert fleet.phase() is Phase.RUNNING
    fleet.does(Seen("attic", OLD, 1))
    assert fleet.told() == {"attic"}


def test_a_failure_in_the_first_wave_halts_and_nobody_else_is_told() -> None:
    fleet = Fleet(*names(4))
    fleet.begin()
    first = fleet.in_order()[0]
    fleet.fails(first)
    assert fleet.phase() is Phase.HALTED
    assert "the probe failed" in fleet.state.reason
    assert first in fleet.state.reason
    assert fleet.told() == set()


def test_silence_past_the_deadline_is_a_failure_but_progress_is_a_sign_of_life() -> None:
    fleet = Fleet(*names(3), plan=Plan(silence_s=600.0, total_s=3600.0))
    fleet.begin()
    first = fleet.in_order()[0]
    fleet.does(Tick(), after=500)
    fleet.reports(first, Outcome.PROGRESS)
    fleet.does(Tick(), after=500)
    assert fleet.phase() is Phase.RUNNING
    fleet.does(Tick(), after=200)
    assert fleet.phase() is Phase.HALTED
    assert fleet.health(first) is Health.SILENT


def test_progress_for_ever_is_a_failure_too() -> None:
    fleet = Fleet("hall", plan=Plan(silence_s=600.0, total_s=3600.0))
    fleet.begin()
    for _ in range(8):
        fleet.reports("hall", Outcome.PROGRESS)
        fleet.does(Tick(), after=499)
    assert fleet.state.devices["hall"].reason == "not done within 3600 s"
    assert fleet.phase() is Phase.HALTED


def test_a_halt_in_the_last_wave_needs_a_count_and_a_share_of_failures() -> None:
    plan = Plan(waves=(1, "rest"), min_healthy_share=0.7, halt_failures=3, halt_share=0.2)
    fleet = Fleet(*names(30), plan=plan)
    fleet.begin()
    devices = fleet.in_order()
    fleet.commits(devices[0])
    fleet.commits(*devices[1:14])
    fleet.fails(*devices[14:17])
    assert fleet.phase() is Phase.RUNNING, "three failures are 18% of 17"
    fleet.fails(devices[17])
    assert fleet.phase() is Phase.HALTED
    assert "4 of 18 devices failed" in fleet.state.reason


def test_a_wave_halts_as_soon_as_it_cannot_get_through() -> None:
    fleet = Fleet(*names(3))
    fleet.begin()
    first, second, _ = fleet.in_order()
    fleet.commits(first)
    fleet.fails(second)
    assert fleet.phase() is Phase.HALTED


def test_a_wave_needs_a_count_and_a_share_of_commits() -> None:
    plan = Plan(waves=(10, "rest"), min_committed=3, min_healthy_share=0.5)
    fleet = Fleet(*names(20), plan=plan)
    fleet.begin()
    wave = fleet.in_order()[:10]
    fleet.commits(*wave[:4])
    assert fleet.state.wave == 0, "four are fewer than half of ten"
    fleet.commits(wave[4])
    assert fleet.state.wave == 1


def test_wave_sizes_are_counts_and_shares_of_the_known_devices() -> None:
    fleet = Fleet(*names(20), plan=Plan(waves=(1, 0.25, "rest")))
    fleet.begin()
    fleet.commits(*fleet.told())
    assert len(fleet.told()) == 1 + 5
    fleet.commits(*fleet.told())
    assert len(fleet.told()) == 20


def test_a_device_that_appears_during_a_full_wave_waits_for_the_next() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.does(Seen("attic", OLD, 1))
    assert fleet.told() == {"hall"}
    fleet.commits("hall")
    assert fleet.told() == {"hall", "attic"}


def test_a_device_that_appears_when_the_rollout_is_done_is_told_at_once() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.commits("hall")
    assert fleet.phase() is Phase.DONE
    assert fleet.does(Seen("attic", OLD, 1)) == [SetTarget("attic", 2)]
    fleet.fails("attic")
    assert fleet.phase() is Phase.DONE, "one straggler does not halt what is done"


def test_failing_stragglers_halt_a_rollout_that_was_done() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.commits("hall")
    for device in names(3):
        fleet.does(Seen(device, OLD, 1))
    fleet.fails(*names(3))
    assert fleet.phase() is Phase.HALTED
    fleet.does(Seen("attic", OLD, 1))
    assert "attic" not in fleet.told()


def test_an_empty_wave_waits_for_known_devices_that_are_offline() -> None:
    fleet = Fleet(*names(2), plan=Plan(waves=(1, 1, "rest")))
    fleet.begin()
    first, second = fleet.in_order()
    fleet.does(Gone(second))
    fleet.commits(first)
    assert (fleet.phase(), fleet.state.wave) == (Phase.RUNNING, 1)
    fleet.does(Seen(second, OLD, 1))
    fleet.commits(second)
    assert fleet.phase() is Phase.DONE


def test_devices_that_run_the_content_already_have_committed() -> None:
    fleet = Fleet(*names(3))
    fleet.begin(student=OLD)
    assert fleet.phase() is Phase.DONE
    assert fleet.told() == set(names(3)), "they learn the version that they run"


def test_content_that_some_devices_run_already_goes_to_the_rest_at_once() -> None:
    fleet = Fleet(*names(3))
    fleet.does(Seen(names(3)[0], NEW, 1))
    fleet.begin()
    assert fleet.state.wave == 1
    assert fleet.told() == set(names(3))


def test_a_commit_stands_when_progress_is_reported_after_it() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.commits("hall")
    fleet.reports("hall", Outcome.PROGRESS, student=NEW)
    assert fleet.health("hall") is Health.COMMITTED


def test_a_commit_that_names_another_student_is_a_failure() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.reports("hall", Outcome.COMMITTED, student=OLD)
    assert fleet.phase() is Phase.HALTED


def test_a_device_that_comes_back_with_the_new_student_has_committed_without_a_report() -> None:
    fleet = Fleet("hall")
    fleet.begin()
    fleet.does(Gone("hall"))
    fleet.does(Seen("hall", NEW, 2))
    assert fleet.phase() is Phase.DONE


def test_a_device_that_falls_back_is_told_again_and_fails_when_it_flaps() -> None:
    fleet = Fleet("hall", plan=Plan(max_flaps=2))
    fleet.begin()
    fleet.commits("hall")
    fleet.does(Seen("hall", OLD, 1))
    assert fleet.health("hall") is Health.UPDATING
    assert fleet.told() == {"hall"}
    fleet.commits("hall")
    fleet.does(Seen("hall", OLD, 1))
    assert fleet.health("hall") is Health.FAILED
    assert "2 times" in fleet.state.devices["hall"].reason


def test_soaking_ends_with_time_alone() -> None:
    fleet = Fleet("hall", "attic", plan=Plan(soak_s=60.0))
    fleet.begin()
    fleet.commits(fleet.in_order()[0])
    fleet.does(Tick(), after=30)
    assert fleet.state.wave == 0
    fleet.does(Tick(), after=30)
    assert fleet.state.wave == 1


def test_a_plan_of_one_wave_is_not_done_before_a_device_took_the_release() -> None:
    fleet = Fleet(plan=Plan(waves=("rest",)))
    fleet.begin(devices=("attic",))
    fleet.does(Tick(), after=1e6)
    assert fleet.phase() is Phase.RUNNING
    fleet.does(Seen("attic", OLD, 1))
    fleet.commits("attic")
    assert fleet.phase() is Phase.DONE
