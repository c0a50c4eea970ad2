"""The cloud's database: SQLite through SQLAlchemy, opened so that a commit survives power loss.

A room that stores something declares its tables on :class:`Base`, calls :func:`create_tables` in
its constructor, and uses :func:`read` and :func:`write` for its transactions.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Session

from edge.link import sqlite
from protos.errors import StorageError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from sqlalchemy.pool import ConnectionPoolEntry

SCHEMA_VERSION = 1
# For each older version, the statements that lift a file by one version. Tables that are new need
# none: create_tables makes them.
MIGRATIONS: Mapping[int, str] = {}
_BUSY_TIMEOUT_MS = 10_000


class Base(DeclarativeBase):
    """Root of every table in the cloud."""


def open_database(path: Path) -> Engine:
    """Open or create a database file.

    A corrupt file is renamed to ``<name>.corrupt-<UTC time>`` and logged as an error; the rows that
    can be read are copied into the new file. :func:`edge.link.sqlite.corrupt_copies` lists such
    files until somebody has dealt with them.

    Raises:
        InvalidInputError: the file was written by a newer version of this program.
        StorageError: the disk is full or failed, or another process keeps the file locked.
    """
    sqlite.open_sqlite(path, schema="", version=SCHEMA_VERSION, migrations=MIGRATIONS).close()
    engine = create_engine(f"sqlite+pysqlite:///{path}")
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


@contextmanager
def opened(path: Path) -> Iterator[Engine]:
    """:func:`open_database`, for a command that ends; raises as that does."""
    engine = open_database(path)
    try:
        yield engine
    finally:
        engine.dispose()


def _on_connect(connection: sqlite3.Connection, _record: ConnectionPoolEntry) -> None:
    # SQLAlchemy begins transactions itself (_on_begin): Python's module would begin them late, at
    # the first write, and then what was read before could be stale.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _on_begin(connection: Connection) -> None:
    # Immediate unless told otherwise: a transaction that reads and then writes would else fail
    # without waiting when another one has written in between.
    mode = connection.get_execution_options().get("sqlite_begin", "IMMEDIATE")
    connection.exec_driver_sql(f"BEGIN {mode}")


def create_tables(engine: Engine, *models: type[Base]) -> None:
    """Create the tables of ``models`` where they are missing.

    Raises:
        StorageError: the disk is full or failed.
    """
    tables = [Base.metadata.tables[model.__tablename__] for model in models]
    with storage_errors(f"cannot create tables in {engine.url.database}"):
        Base.metadata.create_all(engine, tables=tables)


@contextmanager
def write(engine: Engine) -> Iterator[Session]:
    """One writing transaction: all of it is on the disk afterwards, or none of it.

    Raises:
        StorageError: the disk is full or failed; nothing of the transaction remains.
    """
    with (
        storage_errors(f"cannot write to {engine.url.database}"),
        Session(engine) as session,
        session.begin(),
    ):
        yield session


@contextmanager
def read(engine: Engine) -> Iterator[Session]:
    """One reading transaction: a consistent view that does not block writers.

    Raises:
        StorageError: the disk failed.
    """
    with (
        storage_errors(f"cannot read from {engine.url.database}"),
        Session(engine.execution_options(sqlite_begin="DEFERRED")) as session,
        session.begin(),
    ):
        yield session


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn errors of the disk into :class:`StorageError`; let every other error through.

    Args:
        what: what was being done and where, for the message.
    """
    with sqlite.storage_errors(what):
        try:
            yield
        except DBAPIError as error:
            if error.orig is None or not sqlite.is_storage_error(error.orig):
                raise
            msg = (
                f"{what}: {error.orig}. What was stored before is kept; free space or mend the disk"
            )
            raise StorageError(msg) from error
