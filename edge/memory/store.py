"""Working memory on disk and in RAM: raw demonstrations, never summarised.

RAM is what answers; the file brings it back after a restart. A newer answer to the same request
replaces the older one: the raw evidence of both is in the outbox and then in the cloud.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.link.sqlite import open_sqlite, storage_errors, write
from edge.memory import recall
from protos.errors import InvalidInputError, StorageError
from protos.prompt import Message, Shown

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

_LOG = logging.getLogger(__name__)
CAPACITY = 2000
"""Demonstrations; searching so many takes about a millisecond."""

_VERSION = 1
_SCHEMA = """
CREATE TABLE demonstrations (
  seq INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  messages TEXT NOT NULL,
  answer TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class Demonstration:
    """What was asked, and the right answer; ``id`` is the evidence's id."""

    id: str
    messages: tuple[Message, ...]
    answer: str

    def __post_init__(self) -> None:
        """Refuse an answer that no prompt can hold."""
        Message("assistant", self.answer)


class Memory:
    """The working memory of one device. Safe to use from several threads.

    Args:
        path: the SQLite file; its folder is created.
        capacity: demonstrations that it holds; the oldest leave first.

    Attributes:
        left: demonstrations that had to leave for newer ones since the start.

    Raises:
        StorageError: the disk is full or failed when the file is opened.
        InvalidInputError: the file was written by a newer version of the agent.
    """

    def __init__(self, *, path: Path, capacity: int = CAPACITY) -> None:
        self._path = path
        self._capacity = capacity
        self._lock = threading.Lock()
        self._db = open_sqlite(path, schema=_SCHEMA, version=_VERSION)
        self.left = 0
        # By request, oldest first; beside each what its text is compared by.
        self._rows: dict[str, tuple[str, Demonstration]] = {}
        with storage_errors(f"cannot read {path}"):
            rows = self._db.execute("SELECT id, messages, answer FROM demonstrations ORDER BY seq")
            for row in rows:
                demonstration = _parsed(*row)
                if demonstration is not None:
                    self._keep(demonstration)

    @property
    def size(self) -> int:
        """Demonstrations in memory."""
        return len(self._rows)

    def add(self, demonstration: Demonstration) -> bool:
        """Use a demonstration from now on, in place of an older one of the same request.

        Returns:
            Whether it is on the disk too. Where the disk is full or failed, it is used until the
            next restart, and a warning says so.
        """
        with self._lock:
            gone = self._keep(demonstration)
            try:
                with write(self._db, f"cannot remember {demonstration.id} in {self._path}"):
                    self._delete([demonstration.id, *gone])
                    self._db.execute(
                        "INSERT INTO demonstrations (id, messages, answer) VALUES (?, ?, ?)",
                        (
                            demonstration.id,
                            json.dumps([[m.role, m.content] for m in demonstration.messages]),
                            demonstration.answer,
                        ),
                    )
            except StorageError as error:
                _LOG.warning("%s; it is used until the next restart", error)
                return False
        return True

    def nearest(
        self, messages: Sequence[Message], *, limit: int, min_similarity: float
    ) -> list[Shown]:
        """The demonstrations to show before a request, the most similar last.

        Args:
            messages: the request.
            limit: how many at most.
            min_similarity: 0..1, see :func:`edge.memory.recall.nearest`.
        """
        with self._lock:
            rows = list(self._rows.values())
        chosen = recall.nearest(
            recall.normal(recall.asked(messages)),
            [text for text, _ in rows],
            limit=limit,
            min_similarity=min_similarity,
        )
        return [Shown(rows[i][1].messages, rows[i][1].answer) for i in chosen]

    def wipe(self, ids: Collection[str]) -> int:
        """Forget demonstrations that a release has learned; return how many were there.

        Raises:
            StorageError: the disk is full or failed; nothing is forgotten.
        """
        learned = set(ids)
        with self._lock:
            with write(self._db, f"cannot wipe {len(learned)} demonstrations in {self._path}"):
                self._delete(learned)
            kept = {k: row for k, row in self._rows.items() if row[1].id not in learned}
            wiped = len(self._rows) - len(kept)
            self._rows = kept
        return wiped

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _keep(self, demonstration: Demonstration) -> list[str]:
        """Put it into RAM as the newest; return the ids of those that left."""
        key = recall.same_request(demonstration.messages)
        text = recall.normal(recall.asked(demonstration.messages))
        older = self._rows.pop(key, None)
        gone = [] if older is None else [older[1].id]
        self._rows[key] = (text, demonstration)
        while len(self._rows) > self._capacity:
            gone.append(self._rows.pop(next(iter(self._rows)))[1].id)
            self.left += 1
        return gone

    def _delete(self, ids: Collection[str]) -> None:
        self._db.executemany("DELETE FROM demonstrations WHERE id = ?", [(i,) for i in ids])


def _parsed(identity: str, messages: str, answer: str) -> Demonstration | None:
    """A row of the file; one that makes no sense any more is left out and reported."""
    try:
        turns = tuple(Message(role, content) for role, content in json.loads(messages))
        return Demonstration(identity, turns, answer)
    except (ValueError, TypeError, InvalidInputError) as error:
        _LOG.error("demonstration %s in working memory is malformed: %s", identity, error)
        return None
