"""Evidence as devices make it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event

from cloud.db import open_database
from cloud.evidence.store import EvidenceStore
from protos.v1 import device_pb2

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sqlalchemy import Engine

_NUMBERS = count(1)
Demonstrate = Callable[..., device_pb2.Demonstration]
ReportDrift = Callable[..., device_pb2.DriftReport]


class Clock:
    """A clock that tests set; seconds since 1970."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def new_id() -> Callable[[], str]:
    """Make ids in the form of a UUIDv7."""
    return lambda: f"01900000-0000-7000-8000-{next(_NUMBERS):012x}"


@pytest.fixture
def demonstrate(new_id: Callable[[], str]) -> Demonstrate:
    """Make a demonstration; keywords set its fields."""

    def make(**fields: object) -> device_pb2.Demonstration:
        message = device_pb2.Demonstration(
            id=new_id(),
            channel="home",
            device="lamp-1",
            student="d" * 64,
            created_ms=1_700_000_000_000,
            messages=[device_pb2.ChatMessage(role="user", content="lights on")],
            answer="no",
            correction='{"name": "HassTurnOn"}',
            source=device_pb2.SOURCE_CORRECTION,
            signals=device_pb2.Signals(surprise=0.5, corrected=True),
        )
        message.MergeFrom(device_pb2.Demonstration(**fields))  # type: ignore[arg-type] # by keyword
        return message

    return make


@pytest.fixture
def report_drift(new_id: Callable[[], str]) -> ReportDrift:
    """Make a drift report; keywords set its fields."""

    def make(**fields: object) -> device_pb2.DriftReport:
        message = device_pb2.DriftReport(
            id=new_id(),
            channel="home",
            device="lamp-1",
            student="d" * 64,
            created_ms=1_700_000_000_000,
            kind=device_pb2.DRIFT_KIND_CONCEPT,
            signals=[device_pb2.SignalState(name="correction", alarmed=True, recent=0.5)],
            answered=40,
        )
        message.MergeFrom(device_pb2.DriftReport(**fields))  # type: ignore[arg-type] # by keyword
        return message

    return make


@pytest.fixture
def clock() -> Clock:
    """Give a clock to set."""
    return Clock()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """Open a new database file."""
    opened = open_database(tmp_path / "cloud.db")
    yield opened
    opened.dispose()


@pytest.fixture
def full_disk(engine: Engine) -> Callable[[], AbstractContextManager[None]]:
    """Make the disk full for a while, on every connection: SQLite may not grow the file."""
    most_pages = [2**31 - 2]

    def bound(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count={most_pages[0]}")

    @contextmanager
    def full() -> Iterator[None]:
        before = most_pages[0]
        most_pages[0] = 1  # SQLite takes it for the pages that there are
        yield
        most_pages[0] = before

    event.listen(engine, "checkout", bound)
    return full


@pytest.fixture
def store(engine: Engine, clock: Clock) -> EvidenceStore:
    """Open an evidence store in it."""
    return EvidenceStore(engine, clock=clock)
