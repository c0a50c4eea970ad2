"""A release's manifest: its rules, and the copy on a device's disk.

Whether it is signed, fresh and the newest of its name is :mod:`edge.update.trust`'s business. Here
is what a manifest must be beyond that, and how one that was believed survives a power loss.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, NoReturn

from google.protobuf.message import DecodeError

from edge.delta.files import storage_errors, write_atomic
from edge.student.bundle import BundleFile, digest_of
from protos.errors import IntegrityError, InvalidInputError, SignatureError
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from pathlib import Path

MAX_MANIFEST_BYTES = 3 << 20
MAX_FILE_BYTES = 1 << 40

_HEX = re.compile(r"[0-9a-f]{64}")


def parse(data: bytes, *, channel: str, release: int) -> release_pb2.Manifest:
    """The manifest in bytes that are believed.

    Args:
        data: a serialized ``Manifest``.
        channel: the device's own channel; a manifest of another one is refused.
        release: the version that it must be of.

    Raises:
        SignatureError: it is malformed, of another channel or version, or does not describe a
            whole student.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        _refuse(f"has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read")
    manifest = release_pb2.Manifest()
    try:
        manifest.ParseFromString(data)
    except DecodeError:
        _refuse("is no Manifest")
    if manifest.channel != channel:
        _refuse(f"is for channel {manifest.channel!r}, this device is in {channel!r}")
    if manifest.version != release or release < 1:
        _refuse(f"of release {release} says that it is of {manifest.version}")
    sums = [
        *(f.sha256 for f in manifest.files),
        *(s for d in manifest.deltas for s in (d.base_sha256, d.target_sha256, d.sha256)),
    ]
    if not all(_HEX.fullmatch(s) for s in sums):
        _refuse("has a SHA-256 that is not 64 lower-case hex digits")
    sizes = [*(f.size for f in manifest.files), *(d.size for d in manifest.deltas)]
    if any(size > MAX_FILE_BYTES for size in sizes):
        _refuse(f"has a file of more than {MAX_FILE_BYTES} bytes")
    try:
        student = digest_of(BundleFile(f.name, f.sha256, f.size) for f in manifest.files)
    except InvalidInputError as error:
        _refuse(f"lists other files: {error}")
    if len(manifest.files) != len({f.name for f in manifest.files}) or student != manifest.student:
        _refuse("names a student that its files do not make")
    return manifest


def _refuse(what: str) -> NoReturn:
    msg = f"the release manifest {what}; it is not used, the old student serves on"
    raise SignatureError(msg)


class ManifestFile:
    """The manifest of the running update: the SHA-256 of its bytes in hex, a line end, the bytes.

    It was believed when it was written. The sum guards against disks, not against people: who can
    write to a device's disk needs no release to change what it serves.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> bytes:
        """The bytes as they were written.

        Raises:
            IntegrityError: there are none, or they are damaged.
            StorageError: the disk failed.
        """
        with storage_errors(f"reading {self._path}"):
            data = self._path.read_bytes() if self._path.exists() else b""
        written, _, content = data.partition(b"\n")
        if written != _sum(content):
            msg = f"{self._path} is missing or damaged: the manifest is fetched again"
            raise IntegrityError(msg)
        return content

    def write(self, content: bytes) -> None:
        """Replace it, durably.

        Raises:
            StorageError: the disk is full or failed; the old content is still there.
        """
        write_atomic(self._path, _sum(content) + b"\n" + content)

    def delete(self) -> None:
        """Forget it."""
        self._path.unlink(missing_ok=True)


def _sum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
