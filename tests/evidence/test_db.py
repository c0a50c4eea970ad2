"""The cloud's database: durable, whole, and never silently replaced."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column

from cloud.db import SCHEMA_VERSION, Base, create_tables, open_database, read, write
from edge.link.sqlite import corrupt_copies
from protos.errors import InvalidInputError, StorageError

if TYPE_CHECKING:
    from pathlib import Path


class NoteRow(Base):
    __tablename__ = "test_notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


def note(engine: Engine, *texts: str) -> None:
    with write(engine) as session:
        session.add_all(NoteRow(text=text) for text in texts)


def notes(engine: Engine) -> set[str]:
    with read(engine) as session:
        return set(session.scalars(select(NoteRow.text)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "db.sqlite"


def opened(path: Path) -> Engine:
    engine = open_database(path)
    create_tables(engine, NoteRow)
    return engine


def test_every_connection_is_durable_and_checks_foreign_keys(path: Path) -> None:
    engine = opened(path)
    with (
        engine.connect() as one,
        engine.execution_options(sqlite_begin="DEFERRED").connect() as two,
    ):
        for connection in (one, two):
            for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
                assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value
    engine.dispose()


def test_a_transaction_is_whole_or_nothing(path: Path) -> None:
    engine = opened(path)
    note(engine, "a")
    with pytest.raises(IntegrityError):
        note(engine, "b", "a")
    assert notes(engine) == {"a"}
    engine.dispose()


def test_readers_keep_their_view_while_a_writer_commits(path: Path) -> None:
    engine = opened(path)
    note(engine, "a")
    with read(engine) as session:
        assert session.scalars(select(NoteRow.text)).all() == ["a"]
        note(engine, "b")
        assert session.scalars(select(NoteRow.text)).all() == ["a"]
    assert notes(engine) == {"a", "b"}
    engine.dispose()


def test_a_full_disk_changes_nothing(path: Path) -> None:
    engine = opened(path)
    note(engine, "a")
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError, match=r"db\.sqlite.*full"):
        note(engine, *(f"{n}" * 99 for n in range(99)))
    assert notes(engine) == {"a"}
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=1000000")
    note(engine, "b")
    assert notes(engine) == {"a", "b"}
    engine.dispose()


def test_a_corrupt_file_is_set_aside_and_its_readable_rows_are_kept(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(path)
    note(engine, *(f"{n:0200}" for n in range(2000)))
    engine.dispose()
    data = bytearray(path.read_bytes())
    middle = len(data) // 4096 // 2 * 4096
    data[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    engine = opened(path)
    found = notes(engine)
    assert {f"{0:0200}", f"{1999:0200}"} <= found
    assert len(found) > 1800
    (aside,) = corrupt_copies(path)
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert str(aside) in errors[0]
    assert f"{len(found)} rows were recovered" in errors[-1]
    engine.dispose()


def test_what_is_no_database_is_set_aside(path: Path) -> None:
    path.write_bytes(b"?" * 9999)
    engine = opened(path)
    assert notes(engine) == set()
    assert [p.read_bytes() for p in corrupt_copies(path)] == [b"?" * 9999]
    engine.dispose()


def test_a_file_of_a_newer_version_is_refused(path: Path) -> None:
    opened(path).dispose()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(InvalidInputError, match=f"schema version {SCHEMA_VERSION + 1}"):
        open_database(path)
    assert corrupt_copies(path) == []
