"""A cloud in memory: the real rules of rollouts, and a disk as the real driver keeps it.

What reaches the disk are the same JSON texts, one for the header and one for each device that
changed; a restart reads them back. The curator's part is small: it publishes, begins, rolls back.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from cloud.rollout import guard, machine
from cloud.rollout.events import (
    Begin,
    Event,
    Gone,
    Outcome,
    Report,
    Restarted,
    Seen,
    SetTarget,
    Tick,
    Worse,
)
from cloud.rollout.state import Content, Phase, Rollout, dump_device, dump_header, load
from edge.update.machine import State
from protos.errors import InvalidInputError
from tests.simulator.simulator_device import ALARM, CORRECTION
from tests.simulator.simulator_scenario import Bug, Kind, Release
from tests.simulator.simulator_time import DownError

if TYPE_CHECKING:
    from cloud.rollout.events import Command
    from edge.update import journal
    from edge.update.slots import Entry
    from tests.simulator.simulator_device import Device
    from tests.simulator.simulator_world import World

CHANNEL = "home"
_OPEN = (Phase.RUNNING, Phase.PAUSED)
_OUTCOMES = {State.COMMITTED: Outcome.COMMITTED, State.FAILED: Outcome.FAILED} | {
    State.INCONSISTENT: Outcome.FAILED
}


class Cloud:
    """The one process at the centre. ``state`` is what it holds in memory."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.up = True
        self.state = Rollout(CHANNEL)
        self.releases: dict[int, Release] = {}
        self.stored: set[str] = set()
        self.judgements: list[guard.Judgement] = []
        self.alarms: list[guard.Alarm] = []
        self._header = ""
        self._rows: dict[str, str] = {}
        self._streams: dict[str, set[int]] = {}
        self._watching: dict[str, tuple[Device, int, float]] = {}
        self._judged: tuple[object, ...] = ()
        self._dies: str = ""  # "before" or "after" the next write

    # The process.

    def crash(self) -> None:
        """SIGKILL or a power loss; now, or around the next write."""
        if self.up:
            self._dies = self._world.random.choice(("", "before", "after"))
            if not self._dies:
                self._die()

    def _die(self) -> None:
        self._world.log("the cloud crashes")
        self.up = False
        self._dies = ""
        for device, connection, _ in self._watching.values():
            self._world.plan(
                self._world.random.uniform(0.0, 20.0),
                device,
                partial(device.disconnected, connection),
            )
        self._streams.clear()
        self._watching.clear()
        self._world.plan(self._world.random.uniform(0.5, 40.0), None, self.start)

    def survive(self) -> None:
        """No more crashes."""
        self._dies = ""
        self.start()

    def start(self) -> None:
        """Load what the disk knows."""
        if self.up:
            return
        self.up = True
        self._world.log("the cloud starts")
        if self._header:
            self.state = load(self._header, self._rows.values())
            self._world.ledger.reloaded(self.state)
        self._try(Restarted())
        self.curate()

    def curate(self) -> None:
        """Roll back what was aborted, and begin what was published and has not begun."""
        if not self.up:
            return
        if (wanted := self.state.wanted()) is not None:
            student = wanted.content.student
            last = self.releases[max(self.releases)]
            if (last.version, last.student) == (self.state.version, self.state.student) or (
                last.student != student
            ):
                self.publish(self._world.kind(student), student)
        newest = max(self.releases, default=0)
        if newest > self.state.version:
            self._begin(self.releases[newest])

    def publish(self, kind: Kind, student: str) -> None:
        """Put a release into the store: it begins with :meth:`curate`, perhaps after a crash."""
        if self.up:
            version = max(self.releases, default=0) + 1
            self.releases[version] = Release(version, student, kind)
            self._world.log("release {} is published: {} {}", version, kind, student)

    def order(self, event: Event) -> None:
        """A person intervenes."""
        if self.up:
            self._world.log("a person says {}", event)
            with suppress(InvalidInputError):
                self._try(event)

    def tick(self) -> None:
        """Let deadlines pass, and look at what people say."""
        if self.up:
            self._try(Tick())
        if self.up and self.judgements and Bug.NO_GUARD not in self._world.bugs:
            self._guard()

    def _guard(self) -> None:
        """As :class:`cloud.guarding.Guarding` does."""
        state = self.state
        took = len(guard.those_that_took(state))
        seen = (state.version, len(self.judgements), len(self.alarms), state.phase, took)
        if state.by_guard or state.complete or state.phase not in _OPEN or seen == self._judged:
            return
        self._judged = seen
        signals = guard.evidence(state, self.judgements, self.alarms)
        reason = guard.judge(signals, error=state.plan.guard_error, margin=state.plan.guard_margin)
        if reason is not None:
            self._try(Worse(state.version, reason))

    def _begin(self, release: Release) -> None:
        known = tuple(self._world.devices) if self._world.names_known else ()
        content = Content(release.version, release.student)
        self._try(Begin(content, self._world.scenario.plan, known))

    def _try(self, event: Event) -> None:
        with suppress(DownError):
            self._apply(event)

    def _apply(self, event: Event) -> None:
        """Decide, store, then tell: an event counts when what follows from it is stored."""
        before = self.state
        after, commands = machine.step(before, event, self._world.agenda.now)
        if after is before:
            return
        changed = [after.devices[name] for name in after.moved]
        self._world.ledger.steps(before, event, after, changed)
        if Bug.STORES_LATE in self._world.bugs:
            self.state = after
            self._tell(commands)
        if self._dies == "before":
            self._die()
            raise DownError
        self._header = dump_header(after)
        for device in changed:
            self._rows[device.name] = dump_device(device)
        self._world.ledger.stores(after)
        if self._dies == "after":
            self._die()
            raise DownError
        self.state = after
        if (before.version, before.phase, before.wave) != (after.version, after.phase, after.wave):
            self._world.log(
                "release {} is {}, wave {} {}", after.version, after.phase, after.wave, after.reason
            )
        self._tell(commands)

    def _tell(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, SetTarget):
                self._push(command.device)
            else:
                self._world.plan(self._world.random.uniform(0.0, 5.0), None, self.curate)

    def _push(self, name: str) -> None:
        """Send the target of now down the device's stream, in order."""
        if (watching := self._watching.get(name)) is None:
            return
        device, connection, last = watching
        arrives = max(last, self._world.agenda.now + self._world.network.delay(device.line))
        self._watching[name] = (device, connection, arrives)
        target = self.state.target(name)
        self._world.ledger.told(name, target)
        self._world.plan(
            arrives - self._world.agenda.now, None, partial(device.hear, connection, target)
        )

    # What devices ask.

    def watch(self, device: Device, connection: int, serving: Entry) -> None:
        """A watch stream opens."""
        self._check_up()
        streams = self._streams.setdefault(device.name, set())
        if connection in streams or connection != device.connection:
            return  # the same request twice, or one that was given up
        self._apply(Seen(device.name, serving.student, serving.release))
        streams.add(connection)
        self._watching[device.name] = (device, connection, self._world.agenda.now)
        self._push(device.name)

    def lost(self, name: str, connection: int) -> None:
        """A watch stream broke; the cloud notices after a while."""
        seconds = self._world.random.uniform(0.0, 30.0)
        self._world.plan(seconds, None, partial(self._gone, name, connection))

    def _gone(self, name: str, connection: int) -> None:
        streams = self._streams.get(name)
        if not self.up or streams is None or connection not in streams:
            return
        streams.discard(connection)
        watching = self._watching.get(name)
        if watching is not None and watching[1] == connection:
            del self._watching[name]
        if not streams:
            self._try(Gone(name))

    def report(self, name: str, report: journal.Report) -> bool:
        """A device tells how its update goes."""
        self._check_up()
        event = Report(
            device=name,
            release=report.release,
            outcome=_OUTCOMES.get(report.state, Outcome.PROGRESS),
            student=report.student,
            sequence=report.sequence,
            detail=report.detail,
        )
        if machine.is_stale(self.state, event):
            return False
        self._apply(event)
        return True

    def manifest(self, version: int) -> Release | None:
        """The manifest of a release."""
        self._check_up()
        return self.releases.get(version)

    def part(self) -> None:
        """A range of a release's bytes."""
        self._check_up()

    def ingest(self, device: Device, name: str, kind: str) -> None:
        """An item of a device's outbox arrives over MQTT: store it, then say so."""
        if not self.up:
            return
        answer = partial(device.acknowledged, name)
        if Bug.ANSWERS_FIRST in self._world.bugs:
            self._world.network.send(device.line, answer)
        if self._dies == "before":
            self._die()
            return
        self._store(device.name, name, kind)
        if self._dies == "after":
            self._die()
            return
        self._world.network.send(device.line, answer)

    def _store(self, device: str, name: str, kind: str) -> None:
        """Once, whatever comes how often."""
        if name in self.stored:
            return
        self.stored.add(name)
        what, student = kind.split()
        now = self._world.agenda.now
        if what == ALARM:
            self.alarms.append(guard.Alarm(device, student, now))
        else:
            wrong = what == CORRECTION
            self.judgements.append(
                guard.Judgement(device, student, now, corrected=wrong, schema_broken=False)
            )

    def _check_up(self) -> None:
        if not self.up:
            raise DownError
