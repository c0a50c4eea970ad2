"""SQLite opened so that a commit survives power loss, and damage is set aside instead of erased.

Every file is in WAL mode with ``synchronous=FULL``: a commit is on the disk when it returns. The
schema is versioned by ``PRAGMA user_version``. A damaged file is renamed to
``<name>.corrupt-<UTC time>`` and reported; the rows that SQLite can still read are copied into the
new file.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from protos.errors import InvalidInputError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

_LOG = logging.getLogger(__name__)
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_STORAGE = _DAMAGED | {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
}
_STORAGE_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})
_BUSY_TIMEOUT_S = 10.0


class Database(sqlite3.Connection):
    """A connection that tells what happened when its file was opened.

    Attributes:
        set_aside: where a corrupt file of this name was moved to now, or None.
        recovered: rows copied out of that file.
    """

    set_aside: Path | None = None
    recovered: int = 0


def _code(error: BaseException) -> int | None:
    """The primary result code of SQLite; None if ``error`` does not come from SQLite."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else int(code) & 0xFF


def is_storage_error(error: BaseException) -> bool:
    """Whether ``error`` says that the disk is full, failed, damaged, or kept busy by others."""
    if isinstance(error, OSError):
        return error.errno in _STORAGE_ERRNO
    return _code(error) in _STORAGE


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn errors of the disk into :class:`StorageError`; let every other error through.

    Args:
        what: what was being done and where, for the message.
    """
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if not is_storage_error(error):
            raise
        msg = f"{what}: {error}. What was stored before is kept; free space or mend the disk"
        raise StorageError(msg) from error


@contextmanager
def write(connection: sqlite3.Connection, what: str) -> Iterator[None]:
    """One transaction: all of it is on the disk afterwards, or none of it.

    Raises:
        StorageError: the disk is full or failed; nothing of the transaction remains.
    """
    with storage_errors(what):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            # A full disk makes SQLite roll back by itself, and then there is nothing to end.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def open_sqlite(
    path: Path,
    *,
    schema: str,
    version: int,
    migrations: Mapping[int, str] | None = None,
    utc: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Database:
    """Open or create a database that survives power loss.

    The connection is in autocommit mode; write inside :func:`write`. It may be used from several
    threads if the caller takes a lock.

    Args:
        path: the file; its folder is created.
        schema: statements that make an empty file one of ``version``.
        version: the schema version that the caller understands, from 1.
        migrations: for each older version the statements that lift a file by one version.
        utc: the time of day, for the name of a corrupt file.

    Raises:
        InvalidInputError: the file was written by a newer version, or there is no migration.
        StorageError: the disk is full or failed, or another process keeps the file locked.
    """
    set_aside = None
    with storage_errors(f"cannot open {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        damage = _damage(path)
        if damage is not None:
            set_aside = _set_aside(path, utc())
            _LOG.error(
                "%s is corrupt (%s): set aside as %s; what can be read is copied into a new file",
                path,
                damage,
                set_aside,
            )
        connection = _connect(path)
        try:
            if set_aside is not None:
                connection.recovered = _salvage(set_aside, connection)
                connection.set_aside = set_aside
            _migrate(connection, path, schema, version, migrations or {})
        except BaseException:
            connection.close()
            raise
    return connection


def corrupt_copies(path: Path) -> list[Path]:
    """Corrupt files of this name that were set aside and that nobody has dealt with yet."""
    return sorted(
        p
        for p in path.parent.glob(f"{path.name}.corrupt-*")
        if not p.name.endswith(("-wal", "-shm"))
    )


def _connect(path: Path) -> Database:
    connection = sqlite3.connect(
        path,
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
        factory=Database,
    )
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _damage(path: Path) -> str | None:
    """What is wrong with the file; None if it is sound or absent."""
    if not path.exists():
        return None
    with closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)) as connection:
        try:
            found = [str(row[0]) for row in connection.execute("PRAGMA quick_check(1)")]
        except sqlite3.DatabaseError as error:
            if _code(error) not in _DAMAGED:
                raise
            return str(error)
    return None if found == ["ok"] else "; ".join(found)


def _set_aside(path: Path, now: datetime) -> Path:
    base = f"{path.name}.corrupt-{now:%Y%m%dT%H%M%SZ}"
    target, n = path.with_name(base), 1
    while target.exists():
        n += 1
        target = path.with_name(f"{base}-{n}")
    # The log goes first and keeps its suffix, so that SQLite finds it beside the renamed file. Cut
    # short between the renames, the next start finds the damage again.
    for suffix in ("-wal", "-shm", ""):
        old = path.with_name(path.name + suffix)
        if old.exists():
            old.rename(target.with_name(target.name + suffix))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return target


def _migrate(
    connection: Database, path: Path, schema: str, version: int, migrations: Mapping[int, str]
) -> None:
    have = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if have > version:
        msg = (
            f"{path} has schema version {have}, and this program knows versions up to {version}: "
            "run the newer program that wrote it, or give another path"
        )
        raise InvalidInputError(msg)
    steps = [schema] if have == 0 else [migrations.get(n, "") for n in range(have, version)]
    if have and not all(steps):
        msg = f"{path} has schema version {have}, and there is no way from there to {version}"
        raise InvalidInputError(msg)
    if have == version:
        return
    with write(connection, f"cannot prepare {path}"):
        for step in steps:
            for statement in _statements(step):
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version={version:d}")


def _statements(script: str) -> Iterator[str]:
    """Split a script; ``executescript`` would commit the transaction around it."""
    statement = ""
    for piece in script.split(";"):
        statement += piece + ";"
        if sqlite3.complete_statement(statement):  # not inside a string or a trigger's body
            if statement.strip() != ";":
                yield statement
            statement = ""


def _salvage(damaged: Path, connection: Database) -> int:
    """Copy the tables and rows that can be read; return the number of rows."""
    copied = 0
    connection.execute("PRAGMA foreign_keys=OFF")
    with closing(sqlite3.connect(damaged, timeout=_BUSY_TIMEOUT_S)) as source:
        try:
            made = source.execute(
                "SELECT type, name, sql FROM sqlite_master"
                " WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
            ).fetchall()
            have = int(source.execute("PRAGMA user_version").fetchone()[0])
        except sqlite3.DatabaseError as error:
            _LOG.error("nothing can be read from %s (%s)", damaged, error)
            made, have = [], 0
        if made and have:
            with write(connection, f"cannot recover {damaged}"):
                # Rows before triggers: a trigger may refuse or repeat what it once did.
                for kind, name, sql in made:
                    if kind == "table":
                        connection.execute(sql)
                        copied += _salvage_table(source, connection, name)
                for kind, _, sql in made:
                    if kind != "table":
                        connection.execute(sql)
                connection.execute(f"PRAGMA user_version={have:d}")
    connection.execute("PRAGMA foreign_keys=ON")
    _LOG.error(
        "%d rows were recovered from %s; keep that file until it is checked", copied, damaged
    )
    return copied


def _salvage_table(source: sqlite3.Connection, target: Database, name: str) -> int:
    """Read up to the damage from the front, then down to it from the back."""
    table = '"' + name.replace('"', '""') + '"'
    copied, last = 0, None
    for order in ("ASC", "DESC"):
        try:
            for rowid, *row in source.execute(
                f"SELECT _rowid_, * FROM {table} ORDER BY _rowid_ {order}"  # noqa: S608 - names from its own schema
            ):
                if order == "DESC" and last is not None and rowid <= last:
                    break
                marks = ", ".join("?" * len(row))
                copied += target.execute(
                    f"INSERT OR IGNORE INTO {table} VALUES ({marks})",  # noqa: S608 - names from its own schema
                    row,
                ).rowcount
                if order == "ASC":
                    last = rowid
        except sqlite3.DatabaseError as error:
            if _code(error) in _STORAGE - _DAMAGED:
                raise
            _LOG.error("table %s: %s; reading on from the other end", name, error)
        else:
            break
    return copied
