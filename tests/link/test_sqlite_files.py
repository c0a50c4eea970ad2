"""SQLite files that are damaged, full, of another version, or in use."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from edge.link.sqlite import Database, corrupt_copies, open_sqlite, write
from protos.errors import InvalidInputError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = """
CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE) STRICT;
CREATE TRIGGER no_delete BEFORE DELETE ON notes BEGIN
  SELECT RAISE(ABORT, 'kept; for ever');
END;
"""
PAGE = 4096


def opened(path: Path, **options: object) -> Database:
    arguments: dict[str, object] = {"schema": SCHEMA, "version": 1, **options}
    return open_sqlite(path, **arguments)  # type: ignore[arg-type] # a test's shorthand


def fill(path: Path, count: int) -> None:
    with closing(opened(path)) as db, write(db, "fill"):
        db.executemany(
            "INSERT INTO notes (text) VALUES (?)", [(f"{n:0200}",) for n in range(count)]
        )


def texts(db: sqlite3.Connection) -> set[str]:
    return {row[0] for row in db.execute("SELECT text FROM notes")}


def test_a_file_is_durable_by_its_settings(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "new" / "a.db")) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert db.execute("PRAGMA foreign_keys").fetchone() == (1,)
        assert db.execute("PRAGMA user_version").fetchone() == (1,)


def test_what_is_no_database_is_set_aside_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(b"not a database at all" * 500)
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    with closing(opened(path, utc=lambda: noon)) as db:
        assert texts(db) == set()
        assert db.recovered == 0
        assert db.set_aside == tmp_path / "a.db.corrupt-20260301T120000Z"
        assert db.set_aside.read_bytes().startswith(b"not a database")
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert "a.db is corrupt" in errors[0]
    assert corrupt_copies(path) == [tmp_path / "a.db.corrupt-20260301T120000Z"]


def test_a_second_corrupt_file_of_the_same_second_does_not_replace_the_first(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.db"
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    for content in (b"first" * 1000, b"second" * 1000):
        path.write_bytes(content)
        opened(path, utc=lambda: noon).close()
    kept = corrupt_copies(path)
    assert [k.read_bytes()[:5] for k in kept] == [b"first", b"secon"]


def test_rows_on_both_sides_of_the_damage_are_recovered(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path, 2000)
    data = bytearray(path.read_bytes())
    middle = len(data) // PAGE // 2 * PAGE
    data[middle : middle + PAGE] = b"\xff" * PAGE
    path.write_bytes(data)
    with closing(opened(path)) as db:
        assert db.set_aside is not None
        found = texts(db)
        assert db.recovered == len(found)
        assert {f"{0:0200}", f"{1999:0200}"} <= found
        assert len(found) > 1900
        assert db.execute("PRAGMA quick_check").fetchone() == ("ok",)
        with pytest.raises(sqlite3.IntegrityError, match="kept; for ever"), write(db, "delete"):
            db.execute("DELETE FROM notes")


def test_a_torn_end_of_the_file_loses_only_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path, 2000)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with closing(opened(path)) as db:
        assert db.set_aside is not None
        assert db.execute("PRAGMA quick_check").fetchone() == ("ok",)
        with write(db, "insert"):
            db.execute("INSERT INTO notes (text) VALUES ('new')")


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path, 10)
    with closing(opened(path)) as db:
        before = texts(db)
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StorageError, match="disk is full"), write(db, "cannot take notes"):
            db.executemany(
                "INSERT INTO notes (text) VALUES (?)", [(f"x{n}" * 100,) for n in range(99)]
            )
        assert texts(db) == before
        db.execute("PRAGMA max_page_count=1000000")
        with write(db, "insert"):
            db.execute("INSERT INTO notes (text) VALUES ('after')")
        assert texts(db) == before | {"after"}


def test_a_file_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    opened(path, version=7).close()
    with pytest.raises(InvalidInputError, match=r"schema version 7.*up to 1"):
        opened(path)
    with closing(opened(path, version=7)) as db:
        assert db.set_aside is None


def test_an_older_file_is_lifted_step_by_step_and_keeps_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path, 3)
    steps = {
        1: "ALTER TABLE notes ADD COLUMN author TEXT;",
        2: "UPDATE notes SET author = 'nobody';",
    }
    with closing(opened(path, version=3, migrations=steps)) as db:
        assert db.execute("SELECT DISTINCT author FROM notes").fetchall() == [("nobody",)]
        assert db.execute("PRAGMA user_version").fetchone() == (3,)


def test_a_migration_that_fails_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    fill(path, 3)
    steps = {1: "ALTER TABLE notes ADD COLUMN author TEXT; DROP TABLE absent;"}
    with pytest.raises(sqlite3.OperationalError, match="absent"):
        opened(path, version=2, migrations=steps)
    with pytest.raises(InvalidInputError, match="no way from there to 2"):
        opened(path, version=2)
    with closing(opened(path)) as db:
        assert len(texts(db)) == 3


def test_a_write_ahead_log_of_a_killed_process_is_no_damage(tmp_path: Path) -> None:
    path, copy = tmp_path / "a.db", tmp_path / "b.db"
    with closing(opened(path)) as db:
        with write(db, "insert"):
            db.execute("INSERT INTO notes (text) VALUES ('in the log')")
        for suffix in ("", "-wal"):
            source = path.with_name(path.name + suffix)
            copy.with_name(copy.name + suffix).write_bytes(source.read_bytes())
    with closing(opened(copy)) as db:
        assert db.set_aside is None
        assert texts(db) == {"in the log"}
