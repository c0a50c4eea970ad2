"""Releases from before 0.2, whose manifests one key signed in the database, taken over once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from sqlalchemy import inspect, text

from cloud.db import write
from cloud.releases.tables import ReleaseBlobRow, ReleaseRow
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from cloud.releases.blobs import Blobs

_log = logging.getLogger(__name__)

_TABLE = "releases"
_MANIFEST_TAG = 0x0A  # field 1, bytes, of the SignedManifest that was
_MORE, _BITS = 0x80, 7  # of a varint


def take_over(engine: Engine, blobs: Blobs) -> None:
    """Make releases of what the old table holds, and drop it; nothing where there is none.

    Their old signatures are worth nothing to devices: they are signed anew with the others.

    Raises:
        StorageError: the disk is full or failed; the next start does it again.
    """
    if not inspect(engine).has_table(_TABLE):
        return
    with write(engine) as session:
        rows = session.execute(text(f"SELECT * FROM {_TABLE}")).mappings().all()  # noqa: S608
        for row in rows:
            try:
                data = _manifest(row["signed"])
                release_pb2.Manifest.FromString(data)
            except (DecodeError, IndexError):
                _log.error("release %d is damaged and left out", row["version"])
                continue
            blob = blobs.put_bytes(data)
            kept = {name: row[name] for name in ("student", "created_ms", "full_bytes")}
            session.merge(
                ReleaseRow(
                    channel=row["channel"],
                    version=row["version"],
                    manifest=blob.sha256,
                    manifest_bytes=blob.size,
                    way_back="",
                    way_back_bytes=0,
                    withdrawn=bool(row["withdrawn"]),
                    delta_bytes=row["delta_bytes"],
                    **kept,
                )
            )
            session.merge(
                ReleaseBlobRow(channel=row["channel"], sha256=blob.sha256, kind="manifest")
            )
        session.execute(text(f"DROP TABLE {_TABLE}"))
    _log.warning(
        "%d releases from before 0.2 were taken over. keys/signing.pem and keys/trusted.pem are "
        "not used any more: give every device tuf/root.json as --trust, then delete them",
        len(rows),
    )


def _manifest(signed: bytes) -> bytes:
    """The manifest inside a serialized SignedManifest.

    >>> _manifest(bytes([0x0A, 3]) + b"abc" + b"signatures")
    b'abc'
    """
    if not signed or signed[0] != _MANIFEST_TAG:
        msg = "it does not begin with a manifest"
        raise DecodeError(msg)
    size, shift, at = 0, 0, 1
    while True:
        size |= (signed[at] & (_MORE - 1)) << shift
        at, more = at + 1, signed[at] & _MORE
        if not more:
            break
        shift += _BITS
    if at + size > len(signed):
        msg = "it ends inside the manifest"
        raise DecodeError(msg)
    return signed[at : at + size]
