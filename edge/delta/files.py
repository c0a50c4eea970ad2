"""Files that appear whole or not at all, whatever moment the power goes."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from protos.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_log = logging.getLogger(__name__)

TEMPORARY = ".tmp"
"""Suffix of what is not finished: whoever finds it after a crash may delete it."""

KEPT_ASIDE = 5
"""Corrupt copies of one file that are kept."""
_BLOCK = 1 << 20


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an operating system's error into a :class:`StorageError` that says what was being done.

    >>> with storage_errors("writing the pointer"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    ...
    protos.errors.StorageError: writing the pointer: No space left on device; what was stored \
before is still there: free space or check the disk, then try again
    """
    try:
        yield
    except OSError as error:
        msg = (
            f"{doing}: {error.strerror or error}; what was stored before is still there: "
            "free space or check the disk, then try again"
        )
        raise StorageError(msg) from error


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in ``folder`` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it is in, so that their names survive a power loss."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_folder(made.parent)


def set_aside(path: Path, why: str) -> Path:
    """Give a file that cannot be read another name, and log it: evidence is not overwritten.

    The latest :data:`KEPT_ASIDE` are kept: a disk that fails must not fill up, too.

    Raises:
        StorageError: it cannot be renamed.
    """
    prefix = f"{path.name}.corrupt-"
    with storage_errors(f"setting {path} aside"):
        names = [p.name.removeprefix(prefix) for p in path.parent.glob(f"{prefix}*")]
        numbers = sorted(int(n) for n in names if n.isdecimal())
        aside = path.with_name(f"{prefix}{max(numbers, default=0) + 1}")
        path.replace(aside)
        for number in numbers[: 1 - KEPT_ASIDE]:
            path.with_name(f"{prefix}{number}").unlink(missing_ok=True)
    _log.error("%s is corrupt (%s): set aside as %s, going on without it", path, why, aside.name)
    return aside


class AtomicFile:
    """A file that gets its name only at :meth:`commit`; otherwise nothing of it is left.

    Only a kill leaves it under its temporary name. With ``resume`` it is then opened as it is, and
    what is written is appended: whoever goes on must check what was there.

    Use it in a ``with`` block. Every failure of the disk is a :class:`StorageError`.
    """

    def __init__(
        self, path: Path, *, fsync: bool = True, resume: bool = False, mode: int | None = None
    ) -> None:
        self._path = path
        self._mode = mode
        self._fsync = fsync
        self._resume = resume
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._descriptor = -1
        self._committed = False

    def __enter__(self) -> Self:
        with storage_errors(f"creating {self._temporary}"):
            flags = os.O_RDWR | os.O_CREAT | (0 if self._resume else os.O_TRUNC)
            if self._mode is None:
                self._descriptor = os.open(self._temporary, flags, 0o644)
            else:
                # A new file: nobody has one open that was there and that everybody could read.
                self._temporary.unlink(missing_ok=True)
                self._descriptor = os.open(self._temporary, flags | os.O_EXCL, 0o600)
                os.fchmod(self._descriptor, self._mode)
            os.lseek(self._descriptor, 0, os.SEEK_END)
        return self

    @property
    def size(self) -> int:
        """Bytes that it has."""
        with storage_errors(f"reading {self._temporary}"):
            return os.fstat(self._descriptor).st_size

    def read(self) -> Iterator[bytes]:
        """All bytes that it has, in blocks."""
        with storage_errors(f"reading {self._temporary}"):
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            while block := os.read(self._descriptor, _BLOCK):
                yield block

    def truncate(self, size: int) -> None:
        """Forget what there is after ``size`` bytes."""
        with storage_errors(f"writing {self._temporary}"):
            os.ftruncate(self._descriptor, size)
            os.lseek(self._descriptor, size, os.SEEK_SET)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of ``data``."""
        view = memoryview(data).cast("B")
        with storage_errors(f"writing {self._temporary}"):
            while view:
                view = view[os.write(self._descriptor, view) :]

    def commit(self) -> None:
        """Make the content durable, then give it its name."""
        with storage_errors(f"storing {self._path}"):
            if self._fsync:
                os.fsync(self._descriptor)
            self._close()
            os.replace(self._temporary, self._path)  # noqa: PTH105 # one module to inject faults in
            self._committed = True
            if self._fsync:
                fsync_folder(self._path.parent)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()
        if not self._committed:
            self._temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Replace ``path`` by ``data``: after a crash it holds all of the old or all of the new.

    Args:
        path: the file.
        data: its new content.
        mode: its permissions, from before the first byte on; None: what the umask leaves.

    Raises:
        StorageError: the disk is full or failed; the old content is still there.
    """
    with AtomicFile(path, mode=mode) as file:
        file.write(data)
        file.commit()


def write_changed(path: Path, data: bytes, *, mode: int | None = None) -> bool:
    """Like :func:`write_atomic`, where ``path`` holds something else; whether it did.

    Raises:
        StorageError: the disk is full or failed; the old content is still there.
    """
    with storage_errors(f"reading {path}"):
        if path.exists() and path.read_bytes() == data:
            return False
    write_atomic(path, data, mode=mode)
    return True
