"""The rules of a rollout, one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloud.rollout.events import (
    Abort,
    Alarm,
    Begin,
    Command,
    Event,
    Gone,
    Outcome,
    Pause,
    Report,
    Restarted,
    Resume,
    RollBack,
    Seen,
    SetTarget,
    Tick,
)
from cloud.rollout.machine import is_stale, step
from cloud.rollout.state import (
    Content,
    Health,
    Phase,
    Plan,
    Rollout,
    dump_device,
    dump_header,
    load,
    order,
)
from protos.errors import IntegrityError, InvalidInputError

OLD, NEW, NEWER = "aa" * 32, "bb" * 32, "cc" * 32


class Fleet:
    """A channel under test: its state, the time, and every command so far."""

    def __init__(self, *devices: str, plan: Plan | None = None) -> None:
        self.state = Rollout("home")
        self.now = 1000.0
        self.plan = plan or Plan()
        self.commands: list[Command] = []
        self.sequence = 0
        for device in devices:
            self.does(Seen(device, OLD, 1))

    def does(self, event: Event, after: float = 1.0) -> list[Command]:
        self.now += after
        self.state, commands = step(self.state, event, self.now)
        self.commands += commands
        return commands

    def begin(self, version: int = 2, student: str = NEW, devices: tuple[str, ...] = ()) -> None:
        self.does(Begin(Content(version, student), self.plan, devices))

    def reports(
        self, device: str, outcome: Outcome, student: str | None = None, release: int | None = None
    ) -> Report:
        self.sequence += 1
        running = self.state.student if outcome is Outcome.COMMITTED else OLD
        report = Report(
            device,
            self.state.version if release is None else release,
            outcome,
            student or running,
            self.sequence,
            "the probe failed" if outcome is Outcome.FAILED else "",
        )
        self.does(report)
        return report

    def commits(self, *devices: str) -> None:
        for device in devices:
            self.reports(device, Outcome.COMMITTED)

    def fails(self, *devices: str) -> None:
        for device in devices:
            self.reports(device, Outcome.FAILED)

    # Methods, not attributes: mypy would take them for constants between two assertions.
    def phase(self) -> Phase:
        return self.state.phase

    def health(self, device: str) -> Health:
        return self.state.devices[device].health

    def told(self) -> set[str]:
        return {d for d in self.state.devices if self.state.target(d) == self.state.version}

    def in_order(self) -> list[str]:
        names = self.state.devices
        return sorted(names, key=lambda d: order("home", self.state.version, d))


def names(count: int) -> list[str]:
    return [f"device-{n}" for n in range(count)]


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


def test_a_drift_alarm_on_the_new_student_counts_as_failure_until_the_rollout_is_done() -> None:
    fleet = Fleet("hall", "attic", plan=Plan(soak_s=60.0))
    fleet.begin()
    first, second = fleet.in_order()
    fleet.commits(first)
    assert fleet.state.wave == 0, "the commit has not held for long enough"
    fleet.does(Alarm(first, OLD))
    assert fleet.phase() is Phase.RUNNING, "an alarm on the old student says nothing"
    fleet.does(Alarm(first, NEW))
    assert fleet.phase() is Phase.HALTED
    fleet.does(Resume())
    fleet.commits(second)
    fleet.does(Tick(), after=61)
    assert fleet.phase() is Phase.DONE
    fleet.does(Alarm(second, NEW))
    assert fleet.phase() is Phase.DONE


def test_soaking_ends_with_time_alone() -> None:
    fleet = Fleet("hall", "attic", plan=Plan(soak_s=60.0))
    fleet.begin()
    fleet.commits(fleet.in_order()[0])
    fleet.does(Tick(), after=30)
    assert fleet.state.wave == 0
    fleet.does(Tick(), after=30)
    assert fleet.state.wave == 1


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
    assert RollBack("home", Content(2, NEW)) in commands
    assert fleet.state.rollback() == Content(2, NEW)
    assert {c for c in commands if isinstance(c, SetTarget)} == {
        SetTarget(d, 0) for d in names(3) if d != first
    }
    assert fleet.does(Abort("twice")) == []
    fleet.begin(version=4, student=NEW)
    assert fleet.told() == set(names(3)), "the others run that content: the first gets it at once"
    fleet.commits(first)
    assert fleet.phase() is Phase.DONE
    assert fleet.state.rollback() is None


def test_aborting_a_done_rollout_does_not_make_it_the_good_one() -> None:
    fleet = Fleet("hall")
    fleet.begin(version=2)
    fleet.commits("hall")
    fleet.begin(version=3, student=NEWER)
    fleet.commits("hall")
    assert fleet.phase() is Phase.DONE
    assert fleet.does(Abort("found bad later")) == [RollBack("home", Content(2, NEW))]
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
    for damaged in ("", "[]", header[:-5], header.replace('"schema": 1', '"schema": 2')):
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
