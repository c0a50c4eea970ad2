"""A device's disk: every call that changes it is counted, and at one of them something happens.

What a kill leaves is what was written. What a power loss leaves is decided here, as strictly as
POSIX allows: of a file the bytes that were there when it was last synced, and of a folder the names
that it had when it was last synced. A milder disk keeps the names and loses the bytes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

_CALLS = (
    "open",
    "write",
    "fsync",
    "ftruncate",
    "replace",
    "rename",
    "link",
    "unlink",
    "mkdir",
    "rmdir",
)
_TAKES_SPACE = ("open", "write", "fsync", "link", "mkdir")
_NAMES = ("replace", "rename", "link")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Fault(StrEnum):
    """What happens at a call."""

    KILLED = "killed"
    POWER_LOST = "power lost: what was not synced is gone"
    POWER_LOST_NAMES_KEPT = "power lost: names are there, bytes that were not synced are zeros"
    FAILS = "the call fails"
    FULL = "the disk is full from then on"


DEADLY = (Fault.KILLED, Fault.POWER_LOST, Fault.POWER_LOST_NAMES_KEPT)


@dataclass(frozen=True)
class Call:
    """A function of ``os``, the path it changes (digests left out), and what the client was at."""

    name: str
    path: str
    state: str
    writing: str
    """The transition that is being written to the journal; empty outside of the journal."""


def faults_at(call: Call, before: Call | None) -> tuple[Fault, ...]:
    """Faults that can come to something new at a call, after the one before it.

    A power loss leaves something new when something was synced, or when a name is there whose bytes
    were not.
    """
    faults = [Fault.KILLED, Fault.FAILS]
    if call.name in _TAKES_SPACE:
        faults.append(Fault.FULL)
    if before is None or before.name == "fsync":
        faults.append(Fault.POWER_LOST)
    if before is not None and before.name in _NAMES:
        faults.append(Fault.POWER_LOST_NAMES_KEPT)
    return tuple(faults)


class Disk:
    """The disk below ``root``, for the rest of this process.

    Args:
        root: the device's folder.
        at: number of the call at which ``fault`` happens, from 1 on; 0: at none; -1: before all.
        fault: what happens.
    """

    def __init__(self, root: Path, *, at: int = 0, fault: Fault | None = None) -> None:
        self.calls: list[Call] = []
        self.state = self.writing = ""
        self._root = root
        self._at = at
        self._fault = fault
        self._off = False
        self._synced = _Synced(root)
        for name in _CALLS:
            setattr(os, name, partial(self._call, name, getattr(os, name)))

    def _call(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 # as what it stands for
        path = None if self._off else self._path(name, args, kwargs)
        if path is None:
            return real(*args, **kwargs)
        self.calls.append(Call(name, _DIGEST.sub("DIGEST", str(path)), self.state, self.writing))
        if self._fault is not None and len(self.calls) == self._at:
            if name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            self._happen(name)
        elif self._fault is Fault.FULL and len(self.calls) > self._at and name in _TAKES_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if name == "fsync":
            return self._synced.sync(self._root / path)
        known = (self._root / path).exists()
        result = real(*args, **kwargs)
        if name in ("open", "mkdir") and not known:
            self._synced.created(self._root / path)
        return result

    def _path(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path | None:
        """The path that a call changes, below the root; None when it changes nothing there."""
        if name == "open" and not args[1] & os.O_CREAT:
            return None
        if isinstance(args[0], int):
            path = Path(f"/proc/self/fd/{args[0]}").readlink()
        else:
            where = kwargs.get("dir_fd")
            folder = Path() if where is None else Path(f"/proc/self/fd/{where}").readlink()
            path = folder / (args[1] if name in ("replace", "rename", "link") else args[0])
        return path.relative_to(self._root) if path.is_relative_to(self._root) else None

    def _happen(self, name: str) -> None:
        if self._fault in DEADLY:
            self._off = True
            if self._fault is not Fault.KILLED:
                self._synced.lose(names=self._fault is Fault.POWER_LOST)
            die()
        if self._fault is Fault.FAILS or name in _TAKES_SPACE:
            code = errno.ENOSPC if name in _TAKES_SPACE else errno.EIO
            raise OSError(code, os.strerror(code))


class _Synced:
    """What is on the platter, as far as anybody made sure of it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: dict[int, dict[str, int]] = {}  # of folders
        self._bytes: dict[int, bytes] = {}  # of files
        self._ids: dict[int, int] = {}  # by inode, which the system may use again
        self._count = count()
        everything = (root, *root.rglob("*"))
        for path in everything:
            if path.stat().st_ino not in self._ids:
                self.created(path)
        for path in everything:
            self.sync(path)

    def created(self, path: Path) -> None:
        number = self._ids[path.stat().st_ino] = next(self._count)
        if path.is_dir():
            self._names[number] = {}

    def sync(self, path: Path) -> None:
        if path.is_dir():
            self._names[self._id(path)] = {p.name: self._id(p) for p in path.iterdir()}
        else:
            self._bytes[self._id(path)] = path.read_bytes()

    def lose(self, *, names: bool) -> None:
        if names:
            root = self._id(self._root)
            shutil.rmtree(self._root)
            self._make(self._root, root, {})
            return
        for path in self._root.rglob("*"):
            if path.is_file():
                there, size = self._bytes.get(self._id(path), b""), path.stat().st_size
                path.write_bytes(there[:size].ljust(size, b"\0"))

    def _make(self, folder: Path, number: int, made: dict[int, Path]) -> None:
        folder.mkdir()
        for name, child in self._names.get(number, {}).items():
            if child in self._names:
                self._make(folder / name, child, made)
            elif child in made:
                (folder / name).hardlink_to(made[child])
            else:
                (folder / name).write_bytes(self._bytes.get(child, b""))
                made[child] = folder / name

    def _id(self, path: Path) -> int:
        return self._ids[path.stat().st_ino]


def die() -> NoReturn:
    """What an operator's ``kill -9`` and the kernel's out-of-memory killer do."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError
