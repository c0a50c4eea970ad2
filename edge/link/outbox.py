"""A durable outbox: evidence stays in it until the cloud says that it has stored it.

What :meth:`Outbox.put` has taken survives SIGKILL and power loss. Nothing leaves except on the
cloud's word: stored items are removed, rejected ones are set aside with the reason. What is in
flight is not kept on disk (a device's flash is worn by every write): after a restart everything is
sent again, and the cloud drops duplicates by id.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.link.sqlite import open_sqlite, storage_errors, write
from protos.errors import InvalidInputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

MAX_PAYLOAD = 64 * 1024
"""Bytes: the cloud rejects what is larger."""

DEMONSTRATION = "demonstration"
DRIFT = "drift"
_KINDS = (DEMONSTRATION, DRIFT)
_VERSION = 1
_SCHEMA = """
CREATE TABLE items (
  seq INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  kind TEXT NOT NULL,
  payload BLOB NOT NULL,
  created REAL NOT NULL,
  rejected_because TEXT
) STRICT;
CREATE INDEX items_waiting ON items (seq) WHERE rejected_because IS NULL;
CREATE TABLE sessions (one INTEGER PRIMARY KEY CHECK (one = 1), last INTEGER NOT NULL) STRICT;
"""


@dataclass(frozen=True)
class Item:
    """One message that waits for the cloud's word."""

    id: str
    kind: str
    payload: bytes


@dataclass(frozen=True)
class Rejected:
    """An item that the cloud will never store, and why. ``created`` in seconds since 1970."""

    id: str
    kind: str
    payload: bytes
    created: float
    reason: str


@dataclass(frozen=True)
class Counts:
    """Items without an answer, items set aside, and the bytes of their payloads together."""

    waiting: int
    rejected: int
    bytes: int


class Outbox:
    """The outbox of one device, in one SQLite file. Safe to use from several threads.

    Args:
        path: the file; its folder is created.
        clock: seconds since 1970.
        max_bytes: payload bytes that it may hold, rejected items included.

    Attributes:
        set_aside: where a corrupt file was moved to when this one was opened, or None.
        recovered: items copied out of that file.

    Raises:
        StorageError: the disk is full or failed.
        InvalidInputError: the file was written by a newer version of the agent.
    """

    def __init__(
        self, path: Path, *, clock: Callable[[], float], max_bytes: int = 256 * 1024 * 1024
    ) -> None:
        self._path = path
        self._clock = clock
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._db = open_sqlite(path, schema=_SCHEMA, version=_VERSION)
        self.set_aside = self._db.set_aside
        self.recovered = self._db.recovered
        self._bytes = self.counts().bytes

    def put(self, kind: str, item_id: str, payload: bytes) -> bool:
        """Store a message; when this returns, it is on the disk.

        Returns:
            True if it is new; False if the same message is already there.

        Raises:
            InvalidInputError: larger than 64 KiB, of unknown kind, or the id belongs to another
                message.
            StorageError: the disk is full or failed, or the outbox has reached its bound.
        """
        if kind not in _KINDS or not item_id:
            msg = f"the outbox takes {' and '.join(_KINDS)} with an id, not {kind!r} {item_id!r}"
            raise InvalidInputError(msg)
        if len(payload) > MAX_PAYLOAD:
            msg = (
                f"{kind} {item_id} has {len(payload)} bytes; the limit is {MAX_PAYLOAD}: "
                "shorten the prompt or the answer"
            )
            raise InvalidInputError(msg)
        with self._lock:
            with write(self._db, f"cannot put {kind} {item_id} into {self._path}"):
                new = self._insert(kind, item_id, payload)
            if new:
                self._bytes += len(payload)
        return new

    def pending(self, limit: int) -> list[Item]:
        """At most ``limit`` items without an answer, oldest first.

        Raises:
            StorageError: the disk failed.
        """
        with self._lock, storage_errors(f"cannot read {self._path}"):
            rows = self._db.execute(
                "SELECT id, kind, payload FROM items WHERE rejected_because IS NULL"
                " ORDER BY seq LIMIT ?",
                (limit,),
            )
            return [Item(*row) for row in rows]

    def stored(self, ids: Collection[str]) -> Counter[str]:
        """Remove items that the cloud has stored; return how many of each kind there were.

        Raises:
            StorageError: the disk is full or failed; the items stay.
        """
        with self._lock:
            with write(self._db, f"cannot remove from {self._path}"):
                removed = [
                    (str(kind), int(size))
                    for i in ids
                    for kind, size in self._db.execute(
                        "DELETE FROM items WHERE id = ? RETURNING kind, LENGTH(payload)", (i,)
                    )
                ]
            self._bytes -= sum(size for _, size in removed)
        return Counter(kind for kind, _ in removed)

    def reject(self, item_id: str, reason: str) -> bool:
        """Set an item aside that the cloud will never store; False if it is not there.

        Raises:
            StorageError: the disk is full or failed; the item stays.
        """
        with self._lock, write(self._db, f"cannot set {item_id} aside in {self._path}"):
            changed = self._db.execute(
                "UPDATE items SET rejected_because = ? WHERE id = ? AND rejected_because IS NULL",
                (reason or "no reason given", item_id),
            )
            return changed.rowcount == 1

    def rejected(self, limit: int) -> list[Rejected]:
        """At most ``limit`` items that were set aside, oldest first.

        Raises:
            StorageError: the disk failed.
        """
        with self._lock, storage_errors(f"cannot read {self._path}"):
            rows = self._db.execute(
                "SELECT id, kind, payload, created, rejected_because FROM items"
                " WHERE rejected_because IS NOT NULL ORDER BY seq LIMIT ?",
                (limit,),
            )
            return [Rejected(*row) for row in rows]

    def counts(self, kind: str | None = None) -> Counts:
        """How much is in the outbox, of one kind or of all.

        Raises:
            StorageError: the disk failed.
        """
        with self._lock, storage_errors(f"cannot read {self._path}"):
            row = self._db.execute(
                "SELECT COUNT(*) FILTER (WHERE rejected_because IS NULL), COUNT(rejected_because),"
                " COALESCE(SUM(LENGTH(payload)), 0) FROM items WHERE kind = ?1 OR ?1 IS NULL",
                (kind,),
            ).fetchone()
            return Counts(*row)

    def next_session(self) -> int:
        """A number greater than every one before, for the next connection's birth and death.

        It is at least the time of day in milliseconds, so that it grows even when the file is lost.

        Raises:
            StorageError: the disk is full or failed.
        """
        with self._lock, write(self._db, f"cannot number a session in {self._path}"):
            row = self._db.execute(
                "INSERT INTO sessions VALUES (1, ?1)"
                " ON CONFLICT DO UPDATE SET last = MAX(last + 1, ?1) RETURNING last",
                (int(self._clock() * 1000),),
            ).fetchone()
            return int(row[0])

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _insert(self, kind: str, item_id: str, payload: bytes) -> bool:
        there = self._db.execute(
            "SELECT kind, payload FROM items WHERE id = ?", (item_id,)
        ).fetchone()
        if there is not None:
            if there != (kind, payload):
                msg = f"id {item_id} already belongs to another message: make a new id"
                raise InvalidInputError(msg)
            return False
        if self._bytes + len(payload) > self._max_bytes:
            msg = (
                f"the outbox {self._path} is full: {self._bytes} of {self._max_bytes} bytes "
                "wait for the cloud. Connect the device, or raise the bound"
            )
            raise StorageError(msg)
        self._db.execute(
            "INSERT INTO items (id, kind, payload, created) VALUES (?, ?, ?, ?)",
            (item_id, kind, payload, self._clock()),
        )
        return True
