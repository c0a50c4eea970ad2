"""A device in memory: its disk, its process, its watch stream, and its outbox."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from edge.link.policy import Flight, SendPolicy, answered, plan
from edge.update.journal import Record
from edge.update.slots import Entry, Pointer
from tests.simulator.simulator_scenario import Bug, Kind, Release
from tests.simulator.simulator_update import Updating

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulator.simulator_time import Line
    from tests.simulator.simulator_world import World

CORRECTION, CONFIRMATION, ALARM = "correction", "confirmation", "alarm"
_POLICY = SendPolicy(window=4)


@dataclass
class Disk:
    """What a crash leaves. A slot is True when it is whole and its digest is right."""

    slots: dict[str, bool]
    pointer: Pointer
    journal: Record = field(default_factory=Record)
    manifest: Release | None = None
    parts: int = 0  # of the release's downloads
    outbox: dict[str, str] = field(default_factory=dict)  # kind by id, oldest first
    full: bool = False


class Device:
    """One device. ``serving`` is None while its process is down."""

    def __init__(self, world: World, name: str, bundle: str, line: Line, skew: float) -> None:
        self.world = world
        self.name = name
        self.line = line
        self.skew = skew
        self.disk = Disk(slots={bundle: True}, pointer=Pointer(Entry(bundle, 0)))
        self.serving: Entry | None = None
        self.connection = 0  # of the newest watch stream
        self.bundle = bundle
        self.before: Entry | None = None  # what served before, for the ledger
        self._connected = False
        self._boot = 0
        self._made = 0

    def start(self) -> None:
        """Open what can serve, as :meth:`edge.update.slots.Slots.start` does; take up the work."""
        if self.serving is not None:
            return
        self._boot += 1
        disk, pointer = self.disk, self.disk.pointer
        for entry in (pointer.current, pointer.previous):
            if entry is not None and self.opens(entry):
                if entry != pointer.current:
                    self.world.strike(self)
                    if not disk.full:
                        disk.pointer = Pointer(entry, None)
                break
        else:
            entry = Entry(self.bundle, 0)
            disk.slots[self.bundle] = True
            disk.pointer = Pointer(entry, None)
        self._flight = Flight()
        self._sends = 0
        self._connected = False
        self.updating = Updating(self)
        self.serve(entry, commit=False)
        self._connect()
        self.updating.settle()
        self._send()

    def crash(self) -> None:
        """SIGKILL or a power loss: memory is gone."""
        if self.serving is None:
            return
        self.world.log("{} crashes in {}", self.name, self.updating.record.state.name)
        self._boot += 1
        self.serving = None
        self._connected = False
        self.world.cloud.lost(self.name, self.connection)
        self.world.plan(self.world.random.uniform(0.5, 30.0), self, self.start)

    def cut(self) -> None:
        """The line fails for a while; both sides of the stream notice that later."""
        self.line.up = False
        self.world.log("{} is cut off", self.name)
        self._lose()
        self.world.plan(self.world.random.expovariate(1 / 30), self, self.mend)

    def mend(self) -> None:
        """The line is back."""
        self.line.up = True

    def alter(self) -> None:
        """One of two whole slots is damaged on the disk."""
        pointer = self.disk.pointer
        entries = [e for e in (pointer.current, pointer.previous) if e is not None]
        if len(entries) == 2 and all(self.disk.slots.get(e.student) for e in entries):
            damaged = self.world.random.choice(entries).student
            self.world.log("{}: slot {} is altered on the disk", self.name, damaged)
            self.disk.slots[damaged] = False
            if self.world.random.random() < 0.7:  # what damages disks ends processes, too
                self.crash()

    def fill(self) -> None:
        """The disk is full for a while."""
        self.disk.full = True
        self.world.plan(self.world.random.uniform(1.0, 60.0), self, self.free)

    def free(self) -> None:
        """There is room on the disk again."""
        self.disk.full = False

    def deceive(self, target: int) -> None:
        """Somebody in the middle of the line sends a target, until the stream breaks."""
        if self.serving is not None:
            self.world.log("{} is told of {} by an impostor", self.name, target)
            self.updating.hear(target)
            self._lose()

    def has(self, student: str) -> bool:
        """Whether hashing the student's slot gives its digest."""
        whole = self.disk.slots.get(student)
        return whole is True or (whole is False and Bug.TRUSTS_FOLDERS in self.world.bugs)

    def opens(self, entry: Entry) -> bool:
        """Whether the student is there whole, and can be opened this time."""
        if not self.has(entry.student):
            return False
        flaps = self.world.kind(entry.student) is Kind.FLAPPING
        return not flaps or entry == self.serving or self.world.random.random() < 0.4

    def serve(self, entry: Entry, *, commit: bool) -> None:
        """Put a student into service."""
        self.serving = entry
        self.world.log("{} serves {}", self.name, entry)
        self.world.ledger.serves(self, entry, commit=commit)
        kind = self.world.kind(entry.student)
        if kind is Kind.FLAPPING:
            self.later(self.world.random.uniform(1.0, 40.0), self.crash)
        elif kind is Kind.DISLIKED:
            self.later(self.world.random.uniform(1.0, 40.0), partial(self._dislike, entry))

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Plan something that dies with the process."""
        self.world.plan(seconds, self, partial(self._if_alive, self._boot, act))

    def call(
        self, serve: Callable[[], object], then: Callable[..., None], failed: Callable[[], None]
    ) -> None:
        """A request to the cloud; its end dies with the process."""
        boot = self._boot
        self.world.network.call(
            self.line,
            serve,
            then=lambda reply: self._if_alive(boot, partial(then, reply)),
            failed=lambda: self._if_alive(boot, failed),
        )

    def _if_alive(self, boot: int, act: Callable[[], None]) -> None:
        if self._boot == boot:
            act()
            self.world.dirty.append(self)

    # The watch stream.

    def _connect(self) -> None:
        if self._connected or self.serving is None:
            return
        self.world.connections += 1
        connection = self.connection = self.world.connections
        self._connected = True

        def failed() -> None:
            self.world.cloud.lost(self.name, connection)
            self.disconnected(connection)

        watch = partial(self.world.cloud.watch, self, connection, self.serving)
        self.call(watch, lambda _: None, failed)

    def _lose(self) -> None:
        connection = self.connection
        self.world.cloud.lost(self.name, connection)
        self.later(self.world.random.uniform(0.0, 30.0), partial(self.disconnected, connection))

    def disconnected(self, connection: int) -> None:
        """The device notices that its watch stream is gone, and connects again."""
        if connection == self.connection and self._connected:
            self._connected = False
            self.later(self.world.random.uniform(0.0, 5.0), self._connect)

    def hear(self, connection: int, target: int) -> None:
        """The watch stream brings a target."""
        if self.serving is not None and self.line.up and connection == self.connection:
            self.updating.hear(target)
            self.world.dirty.append(self)

    # Evidence.

    def demonstrate(self) -> None:
        """A person judges an answer: the demonstration is on its disk when they are thanked."""
        if self.serving is not None and not self.disk.full:
            wrong = self.world.kind(self.serving.student) is Kind.DISLIKED
            self._put(CORRECTION if wrong else CONFIRMATION, self.serving)

    def _dislike(self, entry: Entry) -> None:
        if self.serving == entry and not self.disk.full:
            self._put(ALARM, entry)

    def _put(self, kind: str, entry: Entry) -> None:
        self._made += 1
        name = f"{self.name}/{self._made}"
        self.disk.outbox[name] = f"{kind} {entry.student}"
        self.world.ledger.made(self, name)
        self._send()

    def acknowledged(self, name: str) -> None:
        """The cloud has stored an item."""
        if self.serving is not None:
            self.disk.outbox.pop(name, None)
            self._flight = answered(self._flight, (name,))
            self._send()
            self.world.dirty.append(self)

    def _send(self) -> None:
        now = self.world.agenda.now
        waiting = list(self.disk.outbox)
        if not waiting:
            return
        planned = plan(_POLICY, self._flight, waiting, now=now, random=self.world.random)
        self._flight = planned.flight
        self._sends += 1
        for name in planned.send:
            deliver = partial(self.world.cloud.ingest, self, name, self.disk.outbox[name])
            self.world.network.send(self.line, deliver)
            if Bug.DROPS_AT_SEND in self.world.bugs:
                del self.disk.outbox[name]
        if planned.again_at is not None:
            number = self._sends
            self.later(
                planned.again_at - now, lambda: self._send() if number == self._sends else None
            )
