"""Fetch files by digest into a folder, going on where it stopped."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

from edge.delta.files import fsync_folder, storage_errors
from edge.student.bundle import sha256_file
from edge.update.pace import paced
from protos.errors import IntegrityError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from edge.update.plan import Download
    from edge.update.transport import Piece, Transport

PART = ".part"


class Downloads:
    """The folder of downloads: ``<sha256>.part`` while they come in, ``<sha256>`` when right."""

    def __init__(self, folder: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._monotonic = monotonic

    def path(self, download: Download) -> Path:
        """Where a verified download is."""
        return self._folder / download.sha256

    def _part(self, download: Download) -> Path:
        return self._folder / (download.sha256 + PART)

    def fetched(self, download: Download) -> int:
        """Bytes that are here."""
        paths = (self.path(download), self._part(download))
        return next((p.stat().st_size for p in paths if p.exists()), 0)

    def fetch(
        self,
        download: Download,
        transport: Transport,
        *,
        took: Callable[[Download, int], None],
        interrupted: Callable[[], bool],
    ) -> None:
        """Get all bytes of ``download``, from the byte on where an earlier try stopped.

        Their digest is not checked here: see :meth:`verify`.

        Args:
            download: what to get.
            transport: where from.
            took: called with the download and the number of new bytes.
            interrupted: asked after each piece; when true, what is here so far is kept.

        Raises:
            IntegrityError: the pieces are not of a file of this size; the part was discarded.
            InvalidInputError: the cloud does not have it.
            UnavailableError: the cloud stopped answering, or is too slow; what is here so far is
                kept.
            StorageError: the disk is full or failed.
        """
        if self.path(download).exists():
            return
        part = self._part(download)
        with storage_errors(f"fetching into {part}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            have = os.fstat(descriptor).st_size
            while have < download.size and not interrupted():
                before = have
                pieces = transport.read(download.sha256, have)
                for piece in paced(pieces, monotonic=self._monotonic):
                    _check(piece, download, have)
                    with storage_errors(f"writing {part}"):
                        _write(descriptor, piece.data)
                    have += len(piece.data)
                    took(download, len(piece.data))
                    if interrupted():
                        break
                if have == before:
                    msg = f"the cloud sent nothing of {download.sha256}; asking again later"
                    raise UnavailableError(msg)
            with storage_errors(f"storing {part}"):
                os.fsync(descriptor)
        except IntegrityError:
            self.discard(download)
            raise
        finally:
            os.close(descriptor)

    def verify(self, download: Download) -> None:
        """Hash a download and give it its name.

        Raises:
            IntegrityError: it is not what its name says; it was discarded.
            StorageError: the disk failed.
        """
        part, path = self._part(download), self.path(download)
        with storage_errors(f"verifying {path}"):
            here = part if part.exists() else path
            found = sha256_file(here) if here.exists() else "missing"
            if found == download.sha256:
                here.replace(path)
                fsync_folder(self._folder)
                return
        self.discard(download)
        msg = (
            f"a download of {download.size} bytes is {found} instead of {download.sha256}: it was "
            "thrown away and is fetched again"
        )
        raise IntegrityError(msg)

    def discard(self, download: Download) -> None:
        """Throw a download away."""
        with storage_errors(f"deleting downloads in {self._folder}"):
            for path in (self._part(download), self.path(download)):
                path.unlink(missing_ok=True)

    def keep_only(self, wanted: Collection[Download]) -> None:
        """Delete everything else; with nothing wanted, the folder too."""
        if not wanted:
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        names = {p.name for d in wanted for p in (self.path(d), self._part(d))}
        with storage_errors(f"deleting downloads in {self._folder}"):
            for path in self._folder.iterdir() if self._folder.is_dir() else ():
                if path.name not in names:
                    path.unlink(missing_ok=True)


def _check(piece: Piece, download: Download, have: int) -> None:
    right = piece.size == download.size and piece.offset == have
    if not right or have + len(piece.data) > download.size:
        msg = (
            f"the cloud sent {len(piece.data)} bytes at {piece.offset} of a file of {piece.size} "
            f"where byte {have} of {download.size} of {download.sha256} was due: it is thrown away"
        )
        raise IntegrityError(msg)


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
