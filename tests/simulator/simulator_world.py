"""Runs a scenario: a fleet, a cloud, people and faults, until all is quiet."""

from __future__ import annotations

from collections import deque
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from cloud.rollout.events import Abort, Bring, Event, Pause, Pin, Resume, Unbox, Unpin
from cloud.rollout.state import Content, Health, Phase
from tests.simulator.simulator_cloud import Cloud
from tests.simulator.simulator_device import Device
from tests.simulator.simulator_ledger import BrokenInvariantError, Ledger
from tests.simulator.simulator_scenario import FAULTS_S, START, Bug, Kind, Release, Scenario, times
from tests.simulator.simulator_time import Agenda, Line, Network

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

FACTORY = "factory"
EVIL = "evil"
_TICK_S = 15.0
_QUIET_S = 500_000.0  # a window opens once a day, and each wave may need one
_SLOW_S = 211.0  # shorter than any window


class World:
    """One scenario while it runs. With ``trace`` it keeps what happened, in words."""

    def __init__(
        self, scenario: Scenario, *, bugs: Collection[Bug] = (), trace: bool = False
    ) -> None:
        self.scenario = scenario
        self.bugs = frozenset(bugs)
        self.random = Random(scenario.seed)
        self.agenda = Agenda(START)
        self.network = Network(self.agenda, self.random)
        self.events = 0
        self.connections = 0
        self.dirty: list[Device] = []
        self.names_known = self.random.random() < 0.3
        self.wrong_bytes = scenario.wrong_bytes
        self._impostor = scenario.impostor
        self.kinds = {FACTORY: Kind.GOOD, EVIL: Kind.GOOD}
        self._trace: deque[str] | None = deque(maxlen=400) if trace else None
        self.cloud = Cloud(self)
        self.ledger = Ledger(self)
        self.devices: dict[str, Device] = {}
        for number in range(scenario.devices):
            line = Line(delay=scenario.delay, loss=scenario.loss, duplicate=scenario.duplicate)
            skew = self.random.uniform(-scenario.skew, scenario.skew)
            device = Device(self, f"device-{number}", FACTORY, line, skew)
            self.devices[device.name] = device

    def run(self) -> None:
        """Run to the end.

        Raises:
            BrokenInvariantError: an invariant does not hold.
        """
        self._schedule()
        self._until(START + FAULTS_S)
        self._stop_faults()
        self._tick()
        end = self.agenda.now + _QUIET_S
        while not (self.ledger.ended() and self.ledger.all_stored()) and self._next(end):
            pass
        self.ledger.finish()

    def log(self, text: str, *values: object) -> None:
        """Note what happens, if anybody will read it."""
        if self._trace is not None:
            self._trace.append(f"{self.agenda.now - START:9.2f} {text.format(*values)}")

    @property
    def trace(self) -> str:
        """What happened last."""
        return "\n".join(self._trace or ())

    def kind(self, student: str) -> Kind:
        """What a student does to a device."""
        return self.kinds.get(student, Kind.GOOD)

    def plan(self, seconds: float, device: Device | None, act: Callable[[], None]) -> None:
        """Let something happen, to a device or not."""

        def happen() -> None:
            act()
            if device is not None:
                self.dirty.append(device)

        self.agenda.after(seconds, happen)

    def manifest(self, version: int) -> Release | None:
        """The manifest of a release, as the line brings it: an impostor may sit on it."""
        release = self.cloud.manifest(version)
        if self.random.random() >= self._impostor:
            return release
        older = [r for r in self.cloud.releases.values() if r.version < version]
        if older and self.random.random() < 0.5:
            return self.random.choice(older)
        return Release(version, EVIL, Kind.GOOD, signed=False)

    def strike(self, device: Device) -> None:
        """Impostors wait for a device that fell back: it runs less than it has taken before."""
        if self._impostor:
            self.plan(self.random.uniform(0.0, 3.0), device, partial(self._deceive, device))

    def part(self) -> None:
        """A range of a release's bytes."""
        self.cloud.part()

    def _next(self, until: float) -> bool:
        self.events += 1
        happened = self.agenda.next(until)
        if self.dirty:
            for device in self.dirty:
                self.ledger.check(device)
            self.dirty.clear()
        return happened

    def _until(self, until: float) -> None:
        while self._next(until):
            pass

    def _schedule(self) -> None:
        scenario, random = self.scenario, self.random
        for device in self.devices.values():
            self.plan(random.expovariate(1 / 15), device, device.start)
            for mean, act in (
                (scenario.crashes, device.crash),
                (scenario.cuts, device.cut),
                (scenario.full_disks, device.fill),
                (scenario.altered, device.alter),
                (scenario.demonstrations, device.demonstrate),
                (10.0 * scenario.impostor, partial(self._deceive, device)),
            ):
                for at in times(random, mean, until=FAULTS_S):
                    self.plan(at, device, act)
        for number, kind in enumerate(scenario.kinds):
            at = random.uniform(0.0, FAULTS_S / 4) + number * random.choice((20.0, 80.0))
            self.plan(at, None, partial(self._release, f"student-{number}", kind))
        for at in times(random, scenario.cloud_crashes, until=FAULTS_S):
            self.plan(at, None, self.cloud.crash)
        for at in times(random, scenario.orders, until=FAULTS_S):
            self.plan(at, None, self._intervene)
        for at in times(random, scenario.pins, until=FAULTS_S):
            self.plan(at, None, self._order_device)
        self._tick()

    def _tick(self) -> None:
        quiet = self.agenda.now - START >= FAULTS_S
        self.cloud.tick()
        seconds = 2 * _TICK_S if quiet else _TICK_S
        rollout = self.cloud.state
        if quiet and not any(d.health is Health.UPDATING for d in rollout.devices.values()):
            seconds = _SLOW_S if rollout.plan.windows else seconds
        self.plan(seconds, None, self._tick)

    def _release(self, student: str, kind: Kind) -> None:
        self.kinds[student] = kind
        self.cloud.publish(kind, student)
        self.plan(self.random.uniform(0.0, 5.0), None, self.cloud.curate)

    def _intervene(self) -> None:
        order: Event = self.random.choice((Pause(), Resume(), Resume(), Abort("people complain")))
        if self.random.random() < 0.2 and self.cloud.state.version > 1:
            earlier = self.cloud.releases[self.random.randint(1, self.cloud.state.version - 1)]
            content = Content(earlier.version, earlier.student)
            order = Bring(content, gives_up=self.random.random() < 0.7, reason="rather that one")
        self.cloud.order(order)
        if self.cloud.up:
            self.cloud.curate()

    def _order_device(self) -> None:
        devices = self.cloud.state.devices
        if devices:
            device = devices[self.random.choice(sorted(devices))]
            newest = max(1, self.cloud.state.version)
            pin = Pin(device.name, self.random.randint(min(max(1, device.release), newest), newest))
            self.cloud.order(self.random.choice((pin, Unpin(device.name), Unbox(device.name))))

    def _deceive(self, device: Device) -> None:
        newest = len(self.cloud.releases) + 1
        serving = device.serving.release if device.serving is not None else 0
        device.deceive(self.random.choice((serving + 1, self.random.randint(0, newest))))

    def _stop_faults(self) -> None:
        self.log("faults stop")
        self.wrong_bytes = self._impostor = 0.0
        for device in self.devices.values():
            device.line.up, device.line.loss, device.line.duplicate = True, 0.0, 0.0
            device.disk.full = False
            device.start()
        self.cloud.survive()
        self.cloud.curate()
        for known in list(self.cloud.state.devices.values()):
            if known.pinned is not None:
                self.cloud.order(Unpin(known.name))
        if self.cloud.state.phase is Phase.PAUSED or (
            self.cloud.state.phase is Phase.HALTED and self.random.random() < 0.5
        ):
            self.cloud.order(Resume())


def run(scenario: Scenario, *, bugs: Collection[Bug] = ()) -> World:
    """Run a scenario; one that breaks an invariant is run again for its story.

    Raises:
        BrokenInvariantError: with the seed, how to replay it, and what happened before.
    """
    world = World(scenario, bugs=bugs)
    try:
        world.run()
    except BrokenInvariantError as error:
        again = World(scenario, bugs=bugs, trace=True)
        try:
            again.run()
        except BrokenInvariantError:
            replay = f"SIMULATOR_SEED={scenario.seed} .venv/bin/pytest tests/simulator -k replay"
            error.args = (f"{error}\n{scenario}\n{again.trace}\nreplay: {replay}",)
        raise
    return world
