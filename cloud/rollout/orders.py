"""What people order while the cloud runs: rows in its database, obeyed at its next tick.

An order is on the disk before the command that gave it ends, and is marked as done in the
transaction that stores what followed from it: a cloud that is killed between the two has obeyed it
once or not yet. The table is also the record of who ordered what.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Mapped, mapped_column

from cloud.db import Base, create_tables, read, write
from cloud.rollout import events
from cloud.rollout.state import Wanted, dump_wanted, load_wanted
from protos.errors import InvalidInputError
from protos.topics import check_name

if TYPE_CHECKING:
    from sqlalchemy import Engine

_KINDS: dict[str, type[events.Order]] = {
    "pause": events.Pause,
    "resume": events.Resume,
    "abort": events.Abort,
    "bring": events.Bring,
    "pin": events.Pin,
    "unpin": events.Unpin,
    "unbox": events.Unbox,
}


class OrderRow(Base):
    """An order. ``done_ms`` is None until the cloud has obeyed or refused it."""

    __tablename__ = "rollout_orders"

    number: Mapped[int] = mapped_column(primary_key=True)
    channel: Mapped[str]
    body: Mapped[str]
    person: Mapped[str]
    asked_ms: Mapped[int]
    done_ms: Mapped[int | None]
    refused: Mapped[bool]
    answer: Mapped[str]


@dataclass(frozen=True, kw_only=True)
class Given:
    """An order and what became of it. Times in milliseconds since 1970."""

    number: int
    channel: str
    body: str
    person: str
    asked_ms: int
    done_ms: int | None = None
    refused: bool = False
    answer: str = ""

    @property
    def order(self) -> events.Order:
        """What was ordered.

        Raises:
            InvalidInputError: a newer program wrote it, or it is damaged.
        """
        return parse(self.body)


class Orders:
    """The orders in a cloud's database. Safe to use from several processes.

    Raises:
        StorageError: from every method: the disk is full or failed, and nothing was changed.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        create_tables(engine, OrderRow)

    def give(self, channel: str, order: events.Order, *, person: str, now_ms: int) -> int:
        """Store an order; its number."""
        check_name(channel, "channel")
        row = OrderRow(
            channel=channel,
            body=dump(order),
            person=person,
            asked_ms=now_ms,
            done_ms=None,
            refused=False,
            answer="",
        )
        with write(self._engine) as session:
            session.add(row)
            session.flush()
            return row.number

    def find(self, number: int) -> Given | None:
        """One order."""
        with read(self._engine) as session:
            row = session.get(OrderRow, number)
            return None if row is None else _given(row)

    def pending(self) -> list[Given]:
        """What is still to be obeyed, in the order in which it was given."""
        query = select(OrderRow).where(OrderRow.done_ms.is_(None)).order_by(OrderRow.number)
        with read(self._engine) as session:
            return [_given(row) for row in session.scalars(query)]

    def latest(self, channel: str, limit: int) -> list[Given]:
        """The channel's latest orders, the newest first."""
        query = select(OrderRow).where(OrderRow.channel == channel)
        with read(self._engine) as session:
            rows = session.scalars(query.order_by(OrderRow.number.desc()).limit(limit))
            return [_given(row) for row in rows]


def dump(order: events.Order) -> str:
    """An order as JSON."""
    kind = next(name for name, type_ in _KINDS.items() if isinstance(order, type_))
    values = dict(vars(order))
    if isinstance(order, events.Bring):
        values |= dump_wanted(Wanted(order.content, order.plan))
    return json.dumps({"order": kind, **values})


def parse(body: str) -> events.Order:
    """Read what :func:`dump` wrote.

    Raises:
        InvalidInputError: it is no order, or one of a newer program.

    >>> parse(dump(events.Pin("kitchen", 3)))
    Pin(device='kitchen', release=3)
    """
    try:
        values: dict[str, Any] = json.loads(body)
        kind = _KINDS[values.pop("order")]
        if kind is events.Bring:
            values |= vars(load_wanted(values))
        return kind(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        msg = f"the stored order {body[:200]!r} is none that this program knows"
        raise InvalidInputError(msg) from error


def _given(row: OrderRow) -> Given:
    return Given(
        number=row.number,
        channel=row.channel,
        body=row.body,
        person=row.person,
        asked_ms=row.asked_ms,
        done_ms=row.done_ms,
        refused=row.refused,
        answer=row.answer,
    )
