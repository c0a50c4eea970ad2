"""Where students live on a device: one folder for each, and a pointer to the one in service.

::

    STATE/slots/<digest>/      a whole bundle, named by its digest
    STATE/slots/<digest>.tmp/  one that is being made; after a kill, it is gone on with
    STATE/slots/pointer.json   the current and the previous student, with their releases

The pointer moves by a rename, so that it names the old or the new student at any moment. Files of a
slot are never written again: slots share the files that did not change.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from edge.delta.files import (
    TEMPORARY,
    AtomicFile,
    fsync_folder,
    make_folder,
    set_aside,
    storage_errors,
    write_atomic,
)
from edge.student.bundle import FILES, digest
from protos.errors import IntegrityError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

_log = logging.getLogger(__name__)
_VERSION = 1
_BLOCK = 1 << 20
StudentT = TypeVar("StudentT")


@dataclass(frozen=True)
class Entry:
    """A student by its digest, and the version of the release that brought it (0: provisioned)."""

    student: str
    release: int


NOBODY = Entry("", 0)


@dataclass(frozen=True)
class Pointer:
    """The student in service, and the one before it to fall back to."""

    current: Entry | None = None
    previous: Entry | None = None


class Slots:
    """The slots below one folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._file = root / "pointer.json"
        with storage_errors(f"creating {root}"):
            make_folder(root)

    def folder(self, student: str) -> Path:
        """Where the bundle of ``student`` is, or would be."""
        return self._root / student

    def pointer(self) -> Pointer:
        """What the pointer says; one that cannot be read is set aside and reported."""
        try:
            raw = json.loads(self._file.read_bytes()) if self._file.exists() else None
            if raw is None:
                return Pointer()
            if raw["version"] != _VERSION:
                msg = f"pointer version {raw['version']!r} is not {_VERSION}"
                raise ValueError(msg)  # noqa: TRY301 # one place says what happens to bad pointers
            return Pointer(
                *(raw[k] and Entry(str(raw[k]["student"]), int(raw[k]["release"])) for k in _NAMES)
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            set_aside(self._file, str(error))
            return Pointer()

    def point(self, current: Entry, previous: Entry | None) -> None:
        """Put ``current`` into service for every start from now on.

        Raises:
            StorageError: the disk is full or failed; the pointer is the old one.
        """
        body = {"version": _VERSION, **asdict(Pointer(current, previous))}
        write_atomic(self._file, json.dumps(body, indent=1).encode() + b"\n")

    def check(self, student: str) -> Path:
        """The folder of ``student``, after hashing all of it.

        Raises:
            IntegrityError: it is not there, not whole, or was altered.
        """
        folder = self.folder(student)
        with storage_errors(f"reading {folder}"):
            found = digest(folder)
        if found != student:
            msg = f"{folder} holds a student with digest {found}: it was altered on the disk"
            raise IntegrityError(msg)
        return folder

    def build(self, student: str, makers: Mapping[str, Callable[[Path], None]]) -> Path:
        """Make a slot: each maker writes the file of its name to the path that it is given.

        The slot appears whole and with the right digest, or not at all; a damaged one of the same
        name is replaced. A maker finds what it left behind when it was killed, so that it can go
        on; files that were finished are made again.

        Raises:
            IntegrityError: the files do not make ``student``.
            StorageError: the disk is full or failed.
        """
        folder = self.folder(student)
        temporary = folder.with_name(folder.name + TEMPORARY)
        with storage_errors(f"making the slot {folder}"):
            try:
                temporary.mkdir(exist_ok=True)
                for name in FILES:
                    (temporary / name).unlink(missing_ok=True)
                    makers[name](temporary / name)
                    (temporary / (name + TEMPORARY)).unlink(missing_ok=True)
                found = digest(temporary)
                if found != student:
                    msg = f"the new slot came out as {found}, not as {student}; fetch it again"
                    raise IntegrityError(msg)
                fsync_folder(temporary)
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
                fsync_folder(self._root)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def provision(self, bundle: Path) -> Entry:
        """Copy a bundle into a slot and put it into service: a device's first student.

        Raises:
            IntegrityError: ``bundle`` is not whole.
            StorageError: the disk is full or failed.
        """
        with storage_errors(f"reading {bundle}"):
            student = digest(bundle)
        try:
            self.check(student)
        except IntegrityError:
            self.build(student, {n: partial(copy, bundle / n) for n in FILES})
        entry = Entry(student, 0)
        self._try_to_point(entry)
        return entry

    def start(
        self, *, bundle: Path | None, open_student: Callable[[Path], StudentT]
    ) -> tuple[StudentT, Entry]:
        """Open the student that serves: the current one, else the previous, else the bundle's.

        Where the disk has no room for a copy of the bundle, it serves from where it is.

        Args:
            bundle: a bundle to provision from when no slot can serve; None: there is none.
            open_student: opens the bundle in a folder.

        Raises:
            IntegrityError: nothing could be opened; the message says why for each.
            StorageError: the disk failed.
        """
        pointer = self.pointer()
        reasons: list[str] = []
        for entry in (pointer.current, pointer.previous):
            if entry is not None:
                try:
                    student = open_student(self.check(entry.student))
                except (IntegrityError, StorageError) as error:
                    reasons.append(f"release {entry.release}: {error}")
                    _log.warning("cannot serve the student of %s", reasons[-1])
                    continue
                if entry != pointer.current:
                    self._try_to_point(entry)
                return student, entry
        try:
            if bundle is not None:
                return self._open_first(bundle, open_student)
            reasons.append("no bundle to provision from was given")
        except IntegrityError as error:
            reasons.append(f"the bundle {bundle}: {error}")
        msg = (
            f"no student can serve ({'; '.join(reasons)}): give a whole bundle with --student "
            "(`anabranch student import` makes one)"
        )
        raise IntegrityError(msg)

    def _open_first(
        self, bundle: Path, open_student: Callable[[Path], StudentT]
    ) -> tuple[StudentT, Entry]:
        try:
            entry = self.provision(bundle)
        except StorageError as error:
            _log.warning("%s serves without a copy: %s", bundle, error)
            with storage_errors(f"reading {bundle}"):
                entry = Entry(digest(bundle), 0)
            return open_student(bundle), entry
        return open_student(self.folder(entry.student)), entry

    def _try_to_point(self, entry: Entry) -> None:
        """A full disk is no reason not to serve: the next start will choose the same student."""
        try:
            self.point(entry, None)
        except StorageError as error:
            _log.warning("the pointer still names a student that cannot serve: %s", error)

    def clean(self, keep: Collection[str]) -> None:
        """Delete slots that are unfinished or that are neither pointed to nor in ``keep``."""
        pointer = self.pointer()
        kept = {e.student for e in (pointer.current, pointer.previous) if e} | set(keep)
        with storage_errors(f"cleaning {self._root}"):
            for path in self._root.iterdir():
                if path.is_dir() and path.name not in kept:
                    shutil.rmtree(path, ignore_errors=True)


_NAMES = ("current", "previous")


def copy(source: Path, target: Path) -> None:
    """Copy a file durably.

    Raises:
        StorageError: the disk is full or failed.
    """
    with storage_errors(f"copying {source}"), source.open("rb") as old, AtomicFile(target) as new:
        while block := old.read(_BLOCK):
            new.write(block)
        new.commit()


def link(source: Path, target: Path) -> None:
    """Share a file that is never written again; where the file system cannot, copy it.

    Raises:
        StorageError: the disk is full or failed.
    """
    try:
        os.link(source, target)
    except OSError:
        copy(source, target)
