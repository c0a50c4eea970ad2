"""What holds for every rollout, whatever happens in whatever order."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cloud.rollout.census import take
from cloud.rollout.events import (
    Abort,
    Begin,
    Bring,
    Event,
    Gone,
    Outcome,
    Pause,
    Pin,
    Report,
    Restarted,
    Resume,
    Seen,
    SetTarget,
    Tick,
    Unbox,
    Unpin,
    Worse,
)
from cloud.rollout.machine import step
from cloud.rollout.plan import Plan
from cloud.rollout.state import (
    SCHEMA,
    Content,
    Health,
    Phase,
    Rollout,
    dump_device,
    dump_header,
    load,
)

DEVICES = [f"device-{n}" for n in range(7)]
STUDENTS = ["aa" * 32, "bb" * 32, "cc" * 32]
HELD = (Phase.PAUSED, Phase.HALTED, Phase.ABORTED)
devices = st.sampled_from(DEVICES)
students = st.sampled_from(STUDENTS)
plans = st.builds(
    Plan,
    waves=st.sampled_from([(1, "rest"), (2, 0.5, "rest"), (1, 1, 1, "rest"), ("rest",)]),
    min_committed=st.integers(1, 3),
    min_healthy_share=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    halt_failures=st.integers(1, 4),
    halt_share=st.sampled_from([0.1, 0.5, 1.0]),
    silence_s=st.just(60.0),
    total_s=st.just(200.0),
    soak_s=st.sampled_from([0.0, 30.0]),
    max_flaps=st.integers(1, 3),
    max_updating=st.integers(0, 2),
    windows=st.sampled_from([(), ("00:00-12:00",), ("01:47-01:52", "02:00-02:10")]),
    box_failures=st.integers(1, 3),
    box_s=st.sampled_from([50.0, 400.0]),
)


def reborn(state: Rollout) -> Rollout:
    """What a restart makes of a state."""
    return load(dump_header(state), [dump_device(d) for d in state.devices.values()])


class Rollouts(RuleBasedStateMachine):
    """Any events in any order, each also applied to a copy that was written and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.state = Rollout("home")
        self.now = 1e9
        self.sequence = 0
        self.targets: dict[str, int] = {}

    def happens(self, event: Event) -> None:
        before = self.state
        self.state, commands = step(before, event, self.now)
        again, same_commands = step(reborn(before), event, self.now)
        assert (again, same_commands) == (self.state, commands), "a restart changes nothing"
        if self.state is not before:
            known = before.devices
            moved = {n for n, d in self.state.devices.items() if known.get(n) != d}
            assert moved <= set(self.state.moved), "only what moved is stored"
        for command in commands:
            if isinstance(command, SetTarget):
                assert self.targets.get(command.device, 0) != command.release
                self.targets[command.device] = command.release
        if self.state.phase in HELD and not isinstance(event, Begin):
            # A halt may come of the very event that first opened a wave.
            opened = before.phase is Phase.RUNNING or isinstance(event, Resume)
            assert opened or self.told(self.state) <= self.told(before), "a hold tells nobody"
        if isinstance(event, Report):
            after, more = step(self.state, event, self.now)
            assert after is self.state, "the same report twice counts once"
            assert more == []

    @staticmethod
    def told(state: Rollout) -> set[str]:
        return {d.name for d in state.devices.values() if d.wave is not None}

    @initialize(plan=plans, known=st.sets(devices))
    def first_release(self, plan: Plan, known: set[str]) -> None:
        self.happens(Begin(Content(1, STUDENTS[0]), plan, tuple(sorted(known))))

    @rule(plan=plans, student=students)
    def next_release(self, plan: Plan, student: str) -> None:
        self.happens(Begin(Content(self.state.version + 1, student), plan))

    @rule(device=devices, student=students, behind=st.integers(-1, 2))
    def device_connects(self, device: str, student: str, behind: int) -> None:
        self.happens(Seen(device, student, max(0, self.state.version - behind)))

    @rule(device=devices)
    def device_vanishes(self, device: str) -> None:
        self.happens(Gone(device))

    @rule(
        device=devices,
        outcome=st.sampled_from(Outcome),
        student=students,
        behind=st.integers(0, 1),
        late=st.integers(0, 2),
    )
    def device_reports(
        self, device: str, outcome: Outcome, student: str, behind: int, late: int
    ) -> None:
        self.sequence += 1
        release = max(0, self.state.version - behind)
        sequence = max(1, self.sequence - late)
        self.happens(Report(device, release, outcome, student, sequence))

    @rule(device=devices)
    def device_commits(self, device: str) -> None:
        self.sequence += 1
        state = self.state
        self.happens(Report(device, state.version, Outcome.COMMITTED, state.student, self.sequence))

    @rule()
    def the_guard_speaks(self) -> None:
        self.happens(Worse(self.state.version, "people correct it more"))

    @rule(device=devices, event=st.sampled_from([Pin, Unpin, Unbox]), behind=st.integers(0, 2))
    def someone_orders_a_device(self, device: str, event: type, behind: int) -> None:
        known = self.state.devices.get(device)
        if event is not Pin:
            if known is not None:
                self.happens(event(device))
        elif known is not None and 1 <= (at := self.state.version - behind) >= known.release:
            self.happens(Pin(device, at))

    @precondition(lambda self: self.state.version > 1)
    @rule(gives_up=st.booleans(), back=st.integers(0, 3))
    def someone_wants_an_earlier_release(self, *, gives_up: bool, back: int) -> None:
        version = max(1, self.state.version - gives_up - back)
        self.happens(Bring(Content(version, STUDENTS[0]), gives_up, "rather that one"))

    @rule(seconds=st.sampled_from([1.0, 40.0, 100.0, 300.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.happens(Tick())

    @rule(event=st.sampled_from([Pause(), Resume(), Restarted()]))
    def someone_intervenes(self, event: Pause | Resume | Restarted) -> None:
        self.happens(event)

    @precondition(lambda self: self.state.version > 1)
    @rule()
    def someone_aborts(self) -> None:
        self.happens(Abort("enough"))

    @invariant()
    def commands_keep_every_device_at_its_target(self) -> None:
        assert {d: t for d, t in self.targets.items() if t} == {
            d: self.state.target(d) for d in self.state.devices if self.state.target(d)
        }

    @invariant()
    def a_wave_never_holds_more_than_its_size(self) -> None:
        state = self.state
        for wave in range(len(state.plan.waves)):
            members = [d for d in state.devices.values() if d.wave == wave and not d.excused]
            assert len(members) <= state.plan.capacity(wave, len(state.devices))

    @invariant()
    def a_later_wave_was_opened_by_a_commit(self) -> None:
        if self.state.wave > 0:
            assert any(
                d.wave == 0 and (d.committed_at or d.failed) for d in self.state.devices.values()
            )

    @invariant()
    def the_census_is_what_counting_anew_gives(self) -> None:
        assert self.state.census == take(self.state.devices.values(), self.state.version)

    @invariant()
    def the_state_is_json(self) -> None:
        assert json.loads(dump_header(self.state))["schema"] == SCHEMA

    def teardown(self) -> None:
        """Deadlines alone end every rollout that somebody could end."""
        for _ in range(2 * len(self.state.plan.waves) + 2 + len(DEVICES)):
            self.time_passes(300.0)
        if self.state.phase is Phase.RUNNING and self.state.plan.may_begin(self.now):
            free = [d for d in self.state.devices.values() if not d.aside]
            waiting = [d for d in free if d.health is Health.WAITING]
            assert not any(d.health is Health.UPDATING for d in free)
            assert not any(d.online and d.release <= self.state.version for d in waiting)


class FailingReleases(RuleBasedStateMachine):
    """Devices come, go, fail and fall silent, but none ever commits."""

    def __init__(self) -> None:
        super().__init__()
        plan = Plan(waves=(2, 0.5, "rest"), min_healthy_share=0.5, silence_s=60.0)
        self.now = 1e9
        self.sequence = 0
        begin = Begin(Content(2, STUDENTS[1]), plan)
        self.state, _ = step(Rollout("home"), begin, self.now)

    def happens(self, event: Event) -> None:
        self.now += 1.0
        self.state, _ = step(self.state, event, self.now)

    @rule(device=devices)
    def device_connects(self, device: str) -> None:
        self.happens(Seen(device, STUDENTS[0], 1))

    @rule(device=devices)
    def device_vanishes(self, device: str) -> None:
        self.happens(Gone(device))

    @rule(device=devices, outcome=st.sampled_from([Outcome.FAILED, Outcome.PROGRESS]))
    def device_reports(self, device: str, outcome: Outcome) -> None:
        self.sequence += 1
        self.happens(Report(device, 2, outcome, STUDENTS[0], self.sequence))

    @rule(event=st.sampled_from([Pause(), Resume(), Restarted()]))
    def someone_intervenes(self, event: Pause | Resume | Restarted) -> None:
        self.happens(event)

    @rule()
    def a_deadline_passes(self) -> None:
        self.now += 100.0
        self.happens(Tick())

    @invariant()
    def it_never_passes_its_first_wave(self) -> None:
        assert self.state.wave == 0
        told = [d for d in self.state.devices.values() if d.wave is not None and not d.excused]
        assert len(told) <= 2


_SETTINGS = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRollouts = Rollouts.TestCase
TestRollouts.settings = _SETTINGS
TestFailingReleases = FailingReleases.TestCase
TestFailingReleases.settings = _SETTINGS
