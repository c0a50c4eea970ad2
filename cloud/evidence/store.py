"""The evidence store: raw demonstrations and drift reports are added, and never changed.

There is no way to rewrite or delete evidence: this class has none, and triggers in the database
refuse it to everybody else. Memories that were rewritten into summaries were shown to decay
(arXiv 2605.12978), and every release must be traceable to raw demonstrations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy import Connection, Engine, FromClause, Index, Select, event, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from cloud.db import Base, create_tables, read, write
from cloud.evidence.messages import check_demonstration, check_drift
from protos.errors import InvalidInputError
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

STALE_AFTER_S = 180.0
"""Seconds after its last birth when a device no longer counts as online: it sends one a minute."""
_REASON_LENGTH = 200

Evidence = device_pb2.Demonstration | device_pb2.DriftReport
M = TypeVar("M", device_pb2.Demonstration, device_pb2.DriftReport)


class DemonstrationRow(Base):
    """One demonstration: the columns that are queried, and the raw message."""

    __tablename__ = "demonstrations"
    __table_args__ = (Index("demonstrations_by_channel", "channel", "created_ms"),)

    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    channel: Mapped[str]
    device: Mapped[str]
    student: Mapped[str]
    source: Mapped[int]
    created_ms: Mapped[int]
    received_ms: Mapped[int]
    payload: Mapped[bytes]


class DriftRow(Base):
    """One drift report."""

    __tablename__ = "drift_reports"
    __table_args__ = (Index("drift_reports_by_channel", "channel", "created_ms"),)

    seq: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    channel: Mapped[str]
    device: Mapped[str]
    student: Mapped[str]
    kind: Mapped[int]
    created_ms: Mapped[int]
    received_ms: Mapped[int]
    payload: Mapped[bytes]


class DeviceRow(Base):
    """The latest that is known of a device's connection."""

    __tablename__ = "devices"

    channel: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(primary_key=True)
    session: Mapped[int]
    student: Mapped[str]
    release: Mapped[int]
    agent_version: Mapped[str]
    alive: Mapped[bool]
    born_ms: Mapped[int]
    died_ms: Mapped[int | None]


def _refuse_changes(table: FromClause, connection: Connection, **_: object) -> None:
    for what in ("UPDATE", "DELETE"):
        connection.exec_driver_sql(
            f"CREATE TRIGGER {table.description}_refuse_{what.lower()}"
            f" BEFORE {what} ON {table.description}"
            " BEGIN SELECT RAISE(ABORT, 'evidence is append-only'); END"
        )


event.listen(DemonstrationRow.__table__, "after_create", _refuse_changes)
event.listen(DriftRow.__table__, "after_create", _refuse_changes)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device as its births and deaths show it. Times in milliseconds since 1970, the cloud's."""

    channel: str
    device: str
    session: int
    student: str
    release: int
    agent_version: str
    online: bool
    born_ms: int
    died_ms: int | None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A demonstration without its texts. ``seq`` grows in the order in which they were stored."""

    seq: int
    device: str
    student: str
    received_ms: int
    corrected: bool
    schema_broken: bool


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A drift report without its signals; ``received_ms`` by the cloud's clock."""

    device: str
    student: str
    received_ms: int


class Outcome(StrEnum):
    """What became of evidence."""

    NEW = "new"
    DUPLICATE = "duplicate"
    REJECTED = "rejected"
    LATER = "later"


_STATUSES = {
    Outcome.NEW: device_pb2.ACK_STATUS_STORED,
    Outcome.DUPLICATE: device_pb2.ACK_STATUS_STORED,  # it is stored as well
    Outcome.REJECTED: device_pb2.ACK_STATUS_REJECTED,
    Outcome.LATER: device_pb2.ACK_STATUS_LATER,
}


@dataclass(frozen=True)
class Receipt:
    """The answer for one message.

    Attributes:
        id: the message's.
        outcome: what became of it.
        reason: why it was not stored.
        retry_after_s: with LATER, when to send it again.
    """

    id: str
    outcome: Outcome
    reason: str = ""
    retry_after_s: float = 0.0

    def ack(self) -> device_pb2.AckItem:
        """As a device is told."""
        return device_pb2.AckItem(
            id=self.id,
            status=_STATUSES[self.outcome],
            reason=self.reason,
            retry_after_ms=int(self.retry_after_s * 1000),
        )


class EvidenceStore:
    """Everything that devices have said. Safe to use from several threads.

    Args:
        engine: from :func:`cloud.db.open_database`.
        clock: seconds since 1970.

    Raises:
        StorageError: from every method: the disk is full or failed, and nothing was changed.
    """

    def __init__(self, engine: Engine, *, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock
        create_tables(engine, DemonstrationRow, DriftRow, DeviceRow)

    def add(self, demonstrations: Sequence[device_pb2.Demonstration]) -> list[Receipt]:
        """Store demonstrations in one transaction; one receipt each, in their order."""
        return self._add(demonstrations, DemonstrationRow, check_demonstration)

    def add_drift(self, reports: Sequence[device_pb2.DriftReport]) -> list[Receipt]:
        """Store drift reports in one transaction; one receipt each, in their order."""
        return self._add(reports, DriftRow, check_drift)

    def demonstrations(
        self,
        channel: str,
        *,
        only: Collection[str] | None = None,
        exclude: Collection[str] = (),
        limit: int | None = None,
    ) -> list[device_pb2.Demonstration]:
        """Demonstrations of a channel in the order in which they were made.

        What a release has learned from is in its manifest (``learned_from``): give those ids as
        ``exclude`` for what is new, as ``only`` for replay.

        Args:
            channel: the channel.
            only: take none but these ids.
            exclude: leave these ids out.
            limit: the latest so many.
        """
        query = select(DemonstrationRow.payload).where(DemonstrationRow.channel == channel)
        if only is not None:
            query = query.where(DemonstrationRow.id.in_(_listed(only)))
        if exclude:
            query = query.where(DemonstrationRow.id.not_in(_listed(exclude)))
        query = query.order_by(DemonstrationRow.created_ms.desc(), DemonstrationRow.seq.desc())
        with read(self._engine) as session:
            payloads = session.scalars(query.limit(limit)).all()
        return [device_pb2.Demonstration.FromString(p) for p in reversed(payloads)]

    def judgements(self, channel: str, *, after: int = 0, since_ms: int = 0) -> list[Judged]:
        """What people said of answers, in the order in which it was stored.

        Args:
            channel: the channel.
            after: only what was stored after this ``seq``.
            since_ms: only what came at this time or later, by the cloud's clock (UTC).
        """
        row = DemonstrationRow
        query = (
            select(row.seq, row.device, row.student, row.received_ms, row.payload)
            .where(row.channel == channel, row.seq > after, row.received_ms >= since_ms)
            .order_by(row.seq)
        )
        with read(self._engine) as session:
            return [
                _judged(seq, device, student, received_ms, payload)
                for seq, device, student, received_ms, payload in session.execute(query)
            ]

    def alarms(self, channel: str, *, since_ms: int) -> list[Alarm]:
        """Drift alarms that came at ``since_ms`` (the cloud's clock, UTC) or later."""
        row = DriftRow
        query = select(row.device, row.student, row.received_ms).where(
            row.channel == channel, row.received_ms >= since_ms
        )
        with read(self._engine) as session:
            return [
                Alarm(device=device, student=student, received_ms=received_ms)
                for device, student, received_ms in session.execute(query)
            ]

    def counts(self, channel: str) -> dict[str, int]:
        """How many demonstrations each device of a channel has given."""
        query = (
            select(DemonstrationRow.device, func.count())
            .where(DemonstrationRow.channel == channel)
            .group_by(DemonstrationRow.device)
        )
        with read(self._engine) as session:
            return {row[0]: row[1] for row in session.execute(query)}

    def drift_reports(self, channel: str, *, since_ms: int = 0) -> list[device_pb2.DriftReport]:
        """Drift reports of a channel made at ``since_ms`` (UTC) or later, oldest first."""
        query = (
            select(DriftRow.payload)
            .where(DriftRow.channel == channel, DriftRow.created_ms >= since_ms)
            .order_by(DriftRow.created_ms, DriftRow.seq)
        )
        with read(self._engine) as session:
            return [device_pb2.DriftReport.FromString(p) for p in session.scalars(query)]

    def birth(self, message: device_pb2.Birth) -> bool:
        """A device is there; False if a later session of it is already known."""
        with write(self._engine) as session:
            row = session.get(DeviceRow, (message.channel, message.device))
            if row is not None and row.session > message.session:
                return False
            if row is None:
                row = DeviceRow(channel=message.channel, device=message.device, died_ms=None)
                session.add(row)
            row.session = message.session
            row.student = message.student
            row.release = message.release
            row.agent_version = message.agent_version
            row.alive = True
            row.born_ms = self._now_ms()
        return True

    def death(self, message: device_pb2.Death) -> bool:
        """A device is gone; False if the device is unknown or a later session of it is."""
        with write(self._engine) as session:
            row = session.get(DeviceRow, (message.channel, message.device))
            if row is None or row.session > message.session:
                return False
            row.alive = False
            row.died_ms = self._now_ms()
        return True

    def devices(self, channel: str) -> list[Device]:
        """The devices of a channel by name."""
        query = select(DeviceRow).where(DeviceRow.channel == channel).order_by(DeviceRow.device)
        fresh_ms = self._now_ms() - int(STALE_AFTER_S * 1000)
        with read(self._engine) as session:
            return [
                Device(
                    channel=row.channel,
                    device=row.device,
                    session=row.session,
                    student=row.student,
                    release=row.release,
                    agent_version=row.agent_version,
                    online=row.alive and row.born_ms >= fresh_ms,
                    born_ms=row.born_ms,
                    died_ms=row.died_ms,
                )
                for row in session.scalars(query)
            ]

    def _add(
        self,
        messages: Sequence[M],
        model: type[DemonstrationRow | DriftRow],
        check: Callable[[M], None],
    ) -> list[Receipt]:
        receipts: list[Receipt] = []
        if not messages:
            return receipts
        with write(self._engine) as session:
            known = _payloads(session, model, [m.id for m in messages])
            for message in messages:
                receipt = _judge(message, known, check)
                receipts.append(receipt)
                if receipt.outcome is Outcome.NEW:
                    known[message.id] = message.SerializeToString()
                    session.add(_row(message, known[message.id], self._now_ms()))
        return receipts

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _judged(seq: int, device: str, student: str, received_ms: int, payload: bytes) -> Judged:
    demonstration = device_pb2.Demonstration.FromString(payload)
    return Judged(
        seq=seq,
        device=device,
        student=student,
        received_ms=received_ms,
        corrected=demonstration.source == device_pb2.SOURCE_CORRECTION,
        schema_broken=demonstration.signals.schema_broken,
    )


def _judge(message: M, known: Mapping[str, bytes], check: Callable[[M], None]) -> Receipt:
    try:
        check(message)
    except InvalidInputError as error:
        return Receipt(message.id, Outcome.REJECTED, str(error)[:_REASON_LENGTH])
    there = known.get(message.id)
    if there is None:
        return Receipt(message.id, Outcome.NEW)
    # Messages and not bytes are compared: two versions of protobuf may write one message in two
    # ways.
    if type(message).FromString(there) == message:
        return Receipt(message.id, Outcome.DUPLICATE)
    return Receipt(message.id, Outcome.REJECTED, "this id already belongs to other evidence")


def _payloads(
    session: Session, model: type[DemonstrationRow | DriftRow], ids: Collection[str]
) -> dict[str, bytes]:
    query = select(model.id, model.payload).where(model.id.in_(_listed(ids)))
    return {row[0]: row[1] for row in session.execute(query)}


def _row(message: Evidence, payload: bytes, now_ms: int) -> DemonstrationRow | DriftRow:
    if isinstance(message, device_pb2.Demonstration):
        return DemonstrationRow(
            id=message.id,
            channel=message.channel,
            device=message.device,
            student=message.student,
            source=message.source,
            created_ms=message.created_ms,
            received_ms=now_ms,
            payload=payload,
        )
    return DriftRow(
        id=message.id,
        channel=message.channel,
        device=message.device,
        student=message.student,
        kind=message.kind,
        created_ms=message.created_ms,
        received_ms=now_ms,
        payload=payload,
    )


def _listed(ids: Collection[str]) -> Select[tuple[str]]:
    """Ids as a subquery: SQLite bounds the number of parameters, not the length of one."""
    return select(func.json_each(json.dumps(list(ids))).table_valued("value").c.value)
