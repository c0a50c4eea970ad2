"""Carries rollouts out: keeps their state on the disk, feeds it events, wakes who waits for it.

An event counts when the transaction with all its consequences is committed. Who dies before has not
accepted it and the device sends it again; who dies after comes back to the same state.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import insert, select, update
from sqlalchemy.orm import Mapped, mapped_column

from cloud.db import Base, create_tables, read, write
from cloud.rollout import events
from cloud.rollout.machine import is_stale, step
from cloud.rollout.metrics import RolloutCollector
from cloud.rollout.orders import OrderRow, Orders
from cloud.rollout.plan import Plan
from cloud.rollout.state import Content, Phase, Rollout, Wanted, dump_device, dump_header, load
from protos.errors import InvalidInputError
from protos.topics import check_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client import CollectorRegistry
    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from cloud.rollout.orders import Given

_log = logging.getLogger(__name__)


class RolloutChannelRow(Base):
    """A channel's rollout without its devices, as JSON."""

    __tablename__ = "rollout_channels"

    channel: Mapped[str] = mapped_column(primary_key=True)
    header: Mapped[str]


class RolloutDeviceRow(Base):
    """One device in a channel's rollout, as JSON."""

    __tablename__ = "rollout_devices"

    channel: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(primary_key=True)
    body: Mapped[str]


class RolloutDriver:
    """The rollouts of all channels. Any thread may call it; every method may wait for the disk.

    Call :meth:`tick` every few seconds: deadlines and soak times pass only there, windows open, and
    orders are obeyed. When :meth:`wanted` gives a content, publish a release with it and
    :meth:`begin` that.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        clock: Callable[[], float],
        registry: CollectorRegistry,
        plan: Plan | None = None,
    ) -> None:
        """Load what the database knows.

        Args:
            engine: from :func:`cloud.db.open_database`.
            clock: seconds since the epoch.
            registry: where the metrics go.
            plan: for rollouts that begin from now on.

        Raises:
            IntegrityError: the stored state is damaged.
            StorageError: the disk is full or failed.
        """
        self._engine = engine
        self._clock = clock
        self._plan = plan or Plan()
        self._lock = threading.RLock()
        # Apart from the lock that is held while the disk works: an event loop takes this one.
        self._wakers_lock = threading.Lock()
        self._streams: dict[tuple[str, str], int] = defaultdict(int)
        self._wakers: dict[tuple[str, str], set[Callable[[], None]]] = defaultdict(set)
        create_tables(engine, RolloutChannelRow, RolloutDeviceRow)
        self._orders = Orders(engine)
        self._states = load_states(engine)
        for channel in self._states:
            self._apply(channel, events.Restarted())
        registry.register(RolloutCollector(self.states))

    def begin(
        self, channel: str, version: int, *, student: str, devices: Iterable[str] = ()
    ) -> None:
        """Begin the rollout of a release; a rollout that is under way is superseded. Twice is once.

        Args:
            channel: the release's.
            version: the release's.
            student: the digest of the release's bundle.
            devices: names known from elsewhere, whether online or not.

        Raises:
            InvalidInputError: a release that is not older has begun before, or a name is none.
            StorageError: the disk is full or failed; nothing changed.
        """
        check_name(channel, "channel")
        names = tuple(check_name(device, "device") for device in devices)
        self._apply(channel, events.Begin(Content(version, student), self._plan, names))

    def connected(self, channel: str, device: str, *, student: str, release: int) -> None:
        """A device opened a watch stream, and says what it runs."""
        with self._lock:
            self._apply(channel, events.Seen(device, student, release))
            self._streams[channel, device] += 1

    def disconnected(self, channel: str, device: str) -> None:
        """One watch stream of a device ended; with the last one the device is offline."""
        with self._lock:
            self._streams[channel, device] -= 1
            if self._streams[channel, device] <= 0:
                del self._streams[channel, device]
                self._apply(channel, events.Gone(device))

    def report(self, channel: str, report: events.Report) -> bool:
        """Take a device's report.

        Returns:
            False when a newer report of the device is known; the same one twice is fine.

        Raises:
            StorageError: the disk is full or failed; the device has to report again.
        """
        with self._lock:
            if is_stale(self.state(channel), report):
                return False
            self._apply(channel, report)
            return True

    def worse(self, channel: str, release: int, reason: str) -> None:
        """The guard found a release worse than what devices had before it."""
        self._apply(channel, events.Worse(release, reason))

    def tick(self) -> None:
        """Obey what people ordered, and let deadlines and soak times pass in every channel.

        Raises:
            StorageError: the disk is full or failed; what was not stored comes at the next tick.
        """
        for given in self._orders.pending():
            self._obey(given)
        for channel in self.states():
            self._apply(channel, events.Tick())

    def obey(self, channel: str, order: events.Order) -> bool:
        """Carry out an order at once; whether it changed anything.

        Raises:
            InvalidInputError: it cannot be carried out.
            StorageError: the disk is full or failed; nothing changed.
        """
        with self._lock:
            before = self.state(channel)
            self._apply(channel, order)
            return self.state(channel) is not before

    def wanted(self, channel: str) -> Wanted | None:
        """What a newer release has to bring: an order, or an abort's undoing. Mostly None."""
        return self.state(channel).wanted()

    def target(self, channel: str, device: str) -> int:
        """The version that a device should run; 0: nothing to do."""
        return self.state(channel).target(device)

    def state(self, channel: str) -> Rollout:
        """The channel's rollout; an idle one before the first release."""
        return self._states.get(channel) or Rollout(channel)

    def states(self) -> dict[str, Rollout]:
        """Every channel's rollout."""
        return dict(self._states)

    @contextmanager
    def woken(self, channel: str, device: str, wake: Callable[[], None]) -> Iterator[None]:
        """Have ``wake`` called, from any thread, whenever the device's target has changed."""
        with self._wakers_lock:
            self._wakers[channel, device].add(wake)
        try:
            yield
        finally:
            with self._wakers_lock:
                self._wakers[channel, device].discard(wake)
                if not self._wakers[channel, device]:
                    del self._wakers[channel, device]

    def _obey(self, given: Given) -> None:
        with self._lock:
            before = self.state(given.channel)
            try:
                changed = self._apply(given.channel, given.order, given)
            except InvalidInputError as error:
                answer, refused = str(error), True
            else:
                if changed:
                    _log.info("order %d of %s: %s", given.number, given.person, given.body)
                    return
                refused = False
                answer = f"nothing to change: release {before.version} is {before.phase}"
            _log.warning("order %d of %s: %s", given.number, given.person, answer)
            with write(self._engine) as session:
                self._answer(session, given, answer, refused=refused)

    def _answer(self, session: Session, given: Given, answer: str, *, refused: bool) -> None:
        done_ms = int(self._clock() * 1000)
        values = {"done_ms": done_ms, "answer": answer, "refused": refused}
        session.execute(update(OrderRow).where(OrderRow.number == given.number).values(values))

    def _apply(self, channel: str, event: events.Event, given: Given | None = None) -> bool:
        with self._lock:
            before = self.state(channel)
            after, commands = step(before, event, self._clock())
            if after is before:
                return False
            self._save(before, after, given)
            self._states[channel] = after
        told = [c.device for c in commands if isinstance(c, events.SetTarget)]
        with self._wakers_lock:
            wakers = [w for name in told for w in self._wakers.get((channel, name), ())]
        for wake in wakers:
            wake()
        _log_change(before, after)
        return True

    def _save(self, before: Rollout, after: Rollout, given: Given | None) -> None:
        known: list[dict[str, str]] = []
        new: list[dict[str, str]] = []
        for name in after.moved:
            body = dump_device(after.devices[name])
            row = {"channel": after.channel, "device": name, "body": body}
            (known if name in before.devices else new).append(row)
        header = dump_header(after)
        with write(self._engine) as session:
            # Most events change a device only.
            if before.version == 0 or header != dump_header(before):
                session.merge(RolloutChannelRow(channel=after.channel, header=header))
            # In bulk: opening the last wave changes thousands of devices in one transaction.
            if known:
                session.execute(update(RolloutDeviceRow), known)
            if new:
                session.execute(insert(RolloutDeviceRow), new)
            if given is not None:
                self._answer(session, given, "done", refused=False)


def load_states(engine: Engine) -> dict[str, Rollout]:
    """Every channel's rollout as the database has it.

    Raises:
        IntegrityError: the stored state is damaged.
        StorageError: the disk failed.
    """
    devices = defaultdict(list)
    states = {}
    with read(engine) as session:
        for row in session.scalars(select(RolloutDeviceRow)):
            devices[row.channel].append(row.body)
        for channel in session.scalars(select(RolloutChannelRow)):
            states[channel.channel] = load(channel.header, devices[channel.channel])
    return states


def _log_change(before: Rollout, after: Rollout) -> None:
    if (before.version, before.phase, before.wave) == (after.version, after.phase, after.wave):
        return
    level = logging.WARNING if after.phase in (Phase.HALTED, Phase.ABORTED) else logging.INFO
    _log.log(
        level,
        "channel %s: release %d is %s, wave %d%s",
        after.channel,
        after.version,
        after.phase,
        after.wave,
        f": {after.reason}" if after.reason else "",
    )
