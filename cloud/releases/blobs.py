"""Files by their SHA-256: ``<folder>/<sha256>``, whole or not there."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.delta.files import TEMPORARY, fsync_folder, storage_errors, write_atomic
from edge.student.bundle import sha256_file
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """Content by its SHA-256 (lower-case hex); ``size`` in bytes."""

    sha256: str
    size: int


class Blobs:
    """A folder of blobs.

    A blob may share its bytes with the file that it came from (a hard link), so a program that
    writes into that file changes the blob. Reading a blob therefore hashes it again whenever its
    size or modification time is not what it was at the last hashing.
    """

    def __init__(self, *, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._hashed: dict[str, tuple[int, int]] = {}
        with storage_errors(f"opening {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"*{TEMPORARY}"):
                left.unlink()

    def path(self, sha256: str) -> Path:
        """Where a blob is, or would be.

        Raises:
            InvalidInputError: ``sha256`` is not 64 lower-case hex digits.
        """
        return self._folder / check_sha256(sha256)

    def temporary(self) -> Path:
        """An unused name in the folder; what is left there goes at the next start."""
        return self._folder / f"{uuid.uuid4().hex}{TEMPORARY}"

    def put(self, source: Path) -> Blob:
        """Take in a file, as a hard link where the file system can, else as a copy.

        Raises:
            StorageError: the disk is full or failed; nothing was added.
        """
        temporary = self.temporary()
        with storage_errors(f"storing {source} in {self._folder}"):
            try:
                _link(source, temporary)
                with temporary.open("rb") as file:
                    state = os.fstat(file.fileno())
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
                # Also where the blob exists: a damaged one is healed.
                temporary.replace(self._folder / sha256)
                fsync_folder(self._folder)
            finally:
                # Between two links of one file a rename does nothing and leaves both.
                temporary.unlink(missing_ok=True)
        with self._lock:
            self._hashed[sha256] = (state.st_size, state.st_mtime_ns)
        return Blob(sha256, state.st_size)

    def put_bytes(self, data: bytes) -> Blob:
        """Take in bytes.

        Raises:
            StorageError: the disk is full or failed; nothing was added.
        """
        blob = Blob(hashlib.sha256(data).hexdigest(), len(data))
        # Also where the blob exists: a damaged one is healed.
        write_atomic(self._folder / blob.sha256, data)
        return blob

    def read_all(self, sha256: str) -> bytes:
        """All bytes of a blob: for small ones.

        Raises:
            InvalidInputError: ``sha256`` is malformed.
            IntegrityError: it is missing, or the content is not what it was.
            StorageError: the disk failed.
        """
        self.check(sha256)
        with storage_errors(f"reading {sha256}"):
            return self.path(sha256).read_bytes()

    def copy_out(self, sha256: str, target: Path) -> None:
        """Give a blob's content another name, as a hard link where the file system can.

        Raises:
            InvalidInputError: ``sha256`` is malformed.
            IntegrityError: it is missing, or the content is not what it was.
            StorageError: the disk is full or failed.
        """
        self.check(sha256)
        with storage_errors(f"making {target}"):
            _link(self.path(sha256), target)

    def read(self, sha256: str, offset: int, length: int) -> tuple[bytes, int]:
        """Up to ``length`` bytes from ``offset`` on, none past the end, and the blob's size.

        Raises:
            InvalidInputError: ``sha256`` is malformed.
            IntegrityError: it is missing, or the content is not what it was.
            StorageError: the disk failed.
        """
        with self._open(sha256) as (descriptor, size), storage_errors(f"reading {sha256}"):
            return (os.pread(descriptor, length, offset) if offset < size else b""), size

    def read_cached(self, sha256: str, offset: int, length: int) -> tuple[bytes, int] | None:
        """Like :meth:`read`, but never waits for the disk or for hashing.

        Returns:
            None when it would have to (or would fail): then :meth:`read` does, or says why.
        """
        if sys.platform != "linux":
            return None
        try:
            descriptor = os.open(self.path(sha256), os.O_RDONLY)
        except OSError:
            return None
        try:
            state = os.fstat(descriptor)
            # Without the lock, which is held while something is hashed.
            if self._hashed.get(sha256) != (state.st_size, state.st_mtime_ns):
                return None
            buffer = bytearray(max(0, min(length, state.st_size - offset)))
            found = os.preadv(descriptor, [buffer], offset, os.RWF_NOWAIT) if buffer else 0
        except OSError:  # not in the cache, or a file system that cannot say so
            return None
        finally:
            os.close(descriptor)
        return (bytes(buffer[:found]), state.st_size) if found or not buffer else None

    def check(self, sha256: str) -> None:
        """Make sure that a blob is there, and is what its name says.

        Raises:
            InvalidInputError: ``sha256`` is malformed.
            IntegrityError: it is missing, or the content is not what it was.
            StorageError: the disk failed.
        """
        with self._open(sha256):
            pass

    @contextmanager
    def _open(self, sha256: str) -> Iterator[tuple[int, int]]:
        path = self.path(sha256)
        with storage_errors(f"opening {path}"):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                msg = f"{path} is missing: put it back from a backup, or publish its bundle again"
                raise IntegrityError(msg) from error
        try:
            state = os.fstat(descriptor)
            self._verify(path, (state.st_size, state.st_mtime_ns))
            yield descriptor, state.st_size
        finally:
            os.close(descriptor)

    def _verify(self, path: Path, seen: tuple[int, int]) -> None:
        with self._lock:
            if self._hashed.get(path.name) == seen:
                return
            with storage_errors(f"hashing {path}"):
                found = sha256_file(path)
            if found != path.name:
                msg = (
                    f"{path} holds other bytes than its name says (SHA-256 {found}): something "
                    "wrote into it, or into the bundle that it shares bytes with, or the disk "
                    "failed; put the right file there, or publish its bundle again"
                )
                raise IntegrityError(msg)
            self._hashed[path.name] = seen


def check_sha256(text: str) -> str:
    """Return ``text`` if it is 64 lower-case hex digits; raise otherwise.

    >>> check_sha256("../keys/root.pem")
    Traceback (most recent call last):
    ...
    protos.errors.InvalidInputError: '../keys/root.pem' is not a SHA-256: send 64 lower-case \
hex digits
    """
    if not _SHA256.fullmatch(text):
        msg = f"{text[:80]!r} is not a SHA-256: send 64 lower-case hex digits"
        raise InvalidInputError(msg)
    return text


def _link(source: Path, target: Path) -> None:
    try:
        # Resolved: Linux would link a symbolic link itself, not what it points to.
        target.hardlink_to(source.resolve())
    except OSError:
        # Another file system, or one without hard links; a real failure shows again here.
        shutil.copyfile(source, target)
