"""What a cloud's state folder says of keys and releases, read beside a running cloud."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from cloud.db import opened, read
from cloud.releases.blobs import Blob
from cloud.releases.files import open_files
from cloud.releases.metadata import listed
from cloud.releases.rows import ReleaseRows, path
from cloud.releases.tables import ReleaseRow

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from tuf.api.metadata import Metadata


@dataclass(frozen=True)
class Role:
    """A TUF role: its newest metadata, and the ids of the keys of which ``threshold`` must sign."""

    name: str
    version: int
    expires: datetime
    threshold: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Known:
    """A release; ``state`` is ``released``, ``withdrawn`` or ``waits to be signed``."""

    channel: str
    version: int
    student: str
    created_ms: int
    state: str


def roles(state: Path) -> list[Role]:
    """The four roles of the repository in a state folder.

    Raises:
        InvalidInputError: there is none.
        IntegrityError: it is damaged.
        StorageError: the disk failed.
    """
    files = open_files(state)
    root = files.root()
    found: list[Metadata[Any] | None] = [root, files.targets(root.signed)]
    found += [files.snapshot(), files.timestamp()]
    known = [m.signed for m in found if m is not None]
    return [
        Role(
            signed.type,
            signed.version,
            signed.expires,
            root.signed.roles[signed.type].threshold,
            tuple(root.signed.roles[signed.type].keyids),
        )
        for signed in known
    ]


def releases(state: Path) -> list[Known]:
    """The releases in a state folder, by channel, the newest first.

    Raises:
        InvalidInputError: there is no repository.
        IntegrityError: it is damaged.
        StorageError: the disk failed.
    """
    files = open_files(state)
    believed = listed(files.targets(files.root().signed).signed)
    with opened(state / "cloud.sqlite") as engine:
        ReleaseRows(engine)
        query = select(ReleaseRow).order_by(ReleaseRow.channel, ReleaseRow.version.desc())
        with read(engine) as session:
            return [_known(row, believed) for row in session.scalars(query)]


def _known(row: ReleaseRow, believed: dict[str, Blob]) -> Known:
    manifest = Blob(row.manifest, row.manifest_bytes)
    signed = believed.get(path(row.channel, row.version)) == manifest
    state = "withdrawn" if row.withdrawn else "released" if signed else "waits to be signed"
    return Known(row.channel, row.version, row.student, row.created_ms, state)
