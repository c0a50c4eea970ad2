"""What the database knows of releases: rows in, rows out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError as DuplicateError

from cloud.db import create_tables, read, write
from cloud.releases.blobs import Blob
from cloud.releases.tables import DeltaRow, ReleaseBlobRow, ReleaseRow
from protos.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Engine


class ReleaseRows:
    """The releases of all channels; every method is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        create_tables(engine, ReleaseRow, ReleaseBlobRow, DeltaRow)

    def add(self, row: ReleaseRow, kinds: Mapping[str, str]) -> None:
        """Add a release, and the kinds of its blobs by SHA-256.

        Raises:
            StorageError: the disk is full or failed, or the release is there already.
        """
        channel, version = row.channel, row.version
        try:
            with write(self._engine) as session:
                session.add(row)
                for sha256, kind in kinds.items():
                    session.merge(ReleaseBlobRow(channel=channel, sha256=sha256, kind=kind))
        except DuplicateError as error:
            msg = (
                f"release {version} of channel {channel!r} was published by another process "
                "meanwhile: run one cloud per state folder"
            )
            raise StorageError(msg) from error

    def find(self, channel: str, version: int) -> ReleaseRow | None:
        """A release's row, free of the session."""
        with read(self._engine) as session:
            row = session.get(ReleaseRow, (channel, version))
            if row is not None:
                session.expunge(row)
            return row

    def withdraw(self, channel: str, version: int) -> None:
        """Mark a release as withdrawn, if there is one."""
        with write(self._engine) as session:
            row = session.get(ReleaseRow, (channel, version))
            if row is not None:
                row.withdrawn = True

    def versions(self, channel: str) -> list[int]:
        """All versions of a channel, the newest first."""
        query = select(ReleaseRow.version).where(ReleaseRow.channel == channel)
        with read(self._engine) as session:
            return list(session.scalars(query.order_by(ReleaseRow.version.desc())))

    def latest(self, channel: str) -> int | None:
        """The newest version that was not withdrawn."""
        query = select(func.max(ReleaseRow.version)).where(
            ReleaseRow.channel == channel, ReleaseRow.withdrawn.is_(False)
        )
        with read(self._engine) as session:
            return session.scalar(query)

    def channels(self) -> list[str]:
        """Every channel that has a release."""
        with read(self._engine) as session:
            return list(session.scalars(select(ReleaseRow.channel).distinct()))

    def kind(self, channel: str, sha256: str) -> str | None:
        """What a blob is to a channel."""
        with read(self._engine) as session:
            row = session.get(ReleaseBlobRow, (channel, sha256))
            return None if row is None else row.kind

    def withdrawn(self, channel: str, manifest: str) -> bool:
        """Whether a manifest, by its SHA-256, is of a withdrawn release and of no other."""
        query = select(ReleaseRow.withdrawn).where(
            ReleaseRow.channel == channel, ReleaseRow.manifest == manifest
        )
        with read(self._engine) as session:
            found = list(session.scalars(query))
        return bool(found) and all(found)

    def live(self) -> list[tuple[str, int, Blob]]:
        """Channel, version and manifest of every release that was not withdrawn."""
        query = select(
            ReleaseRow.channel, ReleaseRow.version, ReleaseRow.manifest, ReleaseRow.manifest_bytes
        ).where(ReleaseRow.withdrawn.is_(False))
        with read(self._engine) as session:
            return [(row[0], row[1], Blob(row[2], row[3])) for row in session.execute(query)]

    def wanted(self) -> dict[str, Blob]:
        """What targets metadata should list, by path: releases, and the newest one's way back."""
        newest = select(
            ReleaseRow.channel,
            func.max(ReleaseRow.version),
            ReleaseRow.way_back,  # of that row: SQLite's rule for a bare column beside max()
            ReleaseRow.way_back_bytes,
        ).group_by(ReleaseRow.channel)
        with read(self._engine) as session:
            back = {
                path(channel, version + 1): Blob(sha256, size)
                for channel, version, sha256, size in session.execute(newest)
                if sha256
            }
        return back | {path(channel, version): blob for channel, version, blob in self.live()}


def path(channel: str, version: int) -> str:
    """Where targets metadata lists a release.

    >>> path("home", 7)
    'home/7'
    """
    return f"{channel}/{version}"
