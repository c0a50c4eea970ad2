"""The work of an update's states. Everything here may be done twice: a crash can come anywhere."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from edge import delta
from edge.delta.files import TEMPORARY
from edge.student.bundle import FILES, sha256_file
from edge.update.machine import Event
from edge.update.manifest import ManifestFile, parse
from edge.update.plan import Step, downloads, plan
from edge.update.probe import Student, judge, probe, resident_bytes
from edge.update.slots import Entry, Slots, link
from protos.errors import IntegrityError, InvalidInputError, ProbeError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge.update.fetch import Downloads
    from edge.update.journal import Record
    from edge.update.plan import Download
    from edge.update.transport import Transport
    from edge.update.trust import TrustedReleases
    from protos.v1 import release_pb2

StudentT = TypeVar("StudentT", bound=Student)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Device(Generic[StudentT]):
    """What the agent gives the update client.

    Attributes:
        open_student: opens the bundle in a folder, or raises IntegrityError.
        swap: puts an open student into service between two requests and closes the old one; if it
            raises, the old one still serves.
        reopen: opens what a start of the process would: a student that can serve, and which.
        on_commit: called with the manifest once its student serves and every later start will
            choose it: wipe what ``learned_from`` names. It may be called again after a crash.
        has_room: whether the bundle in a folder can be opened beside the student that serves.
        unload: closes the student that serves; requests wait until the next ``swap``.
        rss_bytes: resident memory of this process.
        monotonic: seconds, for timing canaries.
    """

    open_student: Callable[[Path], StudentT]
    swap: Callable[[StudentT], None]
    reopen: Callable[[], tuple[StudentT, Entry]]
    on_commit: Callable[[release_pb2.Manifest], None]
    has_room: Callable[[Path], bool] = lambda _: True
    unload: Callable[[], None] = lambda: None
    rss_bytes: Callable[[], int] = resident_bytes
    monotonic: Callable[[], float] = time.monotonic


class Work(Generic[StudentT]):
    """Does what the machine's actions ask for; each takes the record and returns an event."""

    def __init__(
        self,
        *,
        device: Device[StudentT],
        slots: Slots,
        downloads: Downloads,
        manifest_file: Path,
        serving: Entry,
        transport: Transport,
        trusted: TrustedReleases,
        interrupted: Callable[[], bool],
        took: Callable[[Download, int], None],
        unloaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.serving = serving
        self._device = device
        self._slots = slots
        self._downloads = downloads
        self._manifest_file = ManifestFile(manifest_file)
        self._transport = transport
        self._trusted = trusted
        self._interrupted = interrupted
        self._took = took
        self._steps: tuple[Step, ...] = ()
        self._candidate: StudentT | None = None
        self._tell_unloaded = unloaded
        self._away = False  # the student that serves was unloaded to make room

    @property
    def has_delta(self) -> bool:
        """Whether the present plan uses a delta."""
        return any(d.kind == "delta" for d in downloads(self._steps))

    def sizes(self) -> tuple[int, int]:
        """Bytes fetched, and to fetch in all, of the present plan."""
        wanted = downloads(self._steps)
        return sum(map(self._downloads.fetched, wanted)), sum(d.size for d in wanted)

    def fetch(self, record: Record) -> tuple[Event | None, Record]:
        """Get the manifest, decide what is needed, and download it; None: it was interrupted.

        Raises:
            SignatureError: the manifest is signed and yet not for this device.
            ExpiredError: what signs it is out of date by the clock here.
            ProbeError: its student failed before.
            IntegrityError: the cloud sent other bytes than it should.
            InvalidInputError: the cloud does not have a file of the release.
            UnavailableError: the cloud does not answer.
            StorageError: the disk is full or failed.
        """
        manifest = self._get_manifest(record)
        record = replace(record, student=manifest.student)
        self._steps = self._plan(manifest, full=record.full)
        wanted = downloads(self._steps)
        self._downloads.keep_only(wanted)
        # Slots of releases that were superseded on the way here would add up.
        self._slots.clean({self.serving.student, record.student, record.student + TEMPORARY})
        for download in wanted:
            try:
                self._downloads.fetch(
                    download, self._transport, took=self._took, interrupted=self._interrupted
                )
            except InvalidInputError:
                if download.kind == "file":
                    raise
                return Event.REFETCH, replace(record, full=True)
            if self._interrupted():
                return None, record
        return Event.FETCHED, record

    def verify(self, record: Record) -> tuple[Event, Record]:
        """Hash the downloads.

        Raises:
            IntegrityError: one is wrong; it was thrown away.
            StorageError: the disk failed.
        """
        for download in downloads(self._steps):
            self._downloads.verify(download)
        return Event.VERIFIED, record

    def apply(self, record: Record) -> tuple[Event, Record]:
        """Make the slot; it appears only whole and with the right digest.

        Raises:
            IntegrityError: base and downloads do not make the student.
            StorageError: the disk is full or failed.
        """
        if self._steps:
            base = self._slots.folder(self.serving.student)
            makers = {s.name: self._maker(s, base / s.name) for s in self._steps}
            self._slots.build(record.student, makers)
        return Event.APPLIED, record

    def probe(self, record: Record) -> tuple[Event, Record]:
        """Open the new student beside the running one and run the canaries.

        Raises:
            ProbeError: it must not serve.
            IntegrityError: it cannot be opened.
        """
        manifest = self._still_whole(record)
        if manifest is None:
            return Event.REFETCH, replace(record, probe_starts=record.probe_starts - 1)
        self.close_candidate()
        self._candidate = self._open(record.student)
        probed = probe(
            self._candidate,
            manifest.canaries,
            monotonic=self._device.monotonic,
            rss_bytes=self._device.rss_bytes,
        )
        judge(probed, manifest.bounds)
        return Event.PROBED, replace(record, equal_share=probed.equal_share)

    def commit(self, record: Record) -> tuple[Event, Record]:
        """Swap, move the pointer, and let the agent wipe what the release covers.

        Raises:
            IntegrityError: after a restart the new student cannot be opened any more.
            StorageError: the pointer cannot be written.
        """
        manifest = self._still_whole(record)
        if manifest is None:
            return Event.REFETCH, record
        new = Entry(record.student, record.release)
        self._put_into_service(new)
        pointer = self._slots.pointer()
        if pointer.current != new:
            # What a start would have opened: the base may have been found damaged meanwhile, or
            # have served out of the bundle.
            before = pointer.current or record.base
            if before.student == new.student:
                self._slots.point(new, pointer.previous)
            else:
                there = self._slots.folder(before.student).is_dir()
                self._slots.point(new, before if there else None)
        self._device.on_commit(manifest)
        return Event.FINISHED, replace(record, floor=max(record.floor, record.release))

    def restore(self, record: Record) -> tuple[Event, Record]:
        """Bring back the student that served before the update, where it does not serve still.

        Raises:
            IntegrityError: it is damaged.
            StorageError: the pointer cannot be written.
        """
        self._drop_candidate()
        # A start that found the base damaged took another one; that one is not left for it.
        old = record.base if self.serving.student == record.student else self.serving
        self._put_into_service(old)
        if self._slots.pointer().current != old:
            self._slots.point(old, None)
        return Event.FINISHED, record

    def clean(self) -> None:
        """Delete downloads, and slots that are neither pointed to nor in service."""
        self.close_candidate()
        self._steps = ()
        self._downloads.keep_only(())
        self._manifest_file.delete()
        self._slots.clean({self.serving.student})

    def free_space(self) -> None:
        """Delete what can be fetched again, so that there is room for the journal."""
        self._downloads.keep_only(())

    def close_candidate(self) -> None:
        """Close a student that was opened and does not serve, and have one that does.

        Raises:
            IntegrityError: none can be opened.
        """
        self._drop_candidate()
        if not self._away:
            return
        try:
            self._put_into_service(self.serving)
        except (IntegrityError, StorageError) as error:
            _log.error("the student in service cannot be opened again: %s", error)
            student, entry = self._device.reopen()
            self._device.swap(student)
            self._away, self.serving = False, entry

    def _drop_candidate(self) -> None:
        if self._candidate is not None:
            candidate, self._candidate = self._candidate, None
            candidate.close()

    def _still_whole(self, record: Record) -> release_pb2.Manifest | None:
        """The manifest; None when it or the new slot is not any more what was believed."""
        try:
            manifest = self._read_manifest(record)
            if self.serving.student != record.student:
                self._slots.check(record.student)
        except (IntegrityError, StorageError) as error:
            _log.warning("release %d is fetched again: %s", record.release, error)
            return None
        return manifest

    def _open(self, student: str) -> StudentT:
        """Open a slot beside the student that serves, or in its place where memory is short."""
        folder = self._slots.check(student)
        if not self._away and not self._device.has_room(folder):
            self._device.unload()
            self._away = True
            self._tell_unloaded()
        return self._device.open_student(folder)

    def _put_into_service(self, entry: Entry) -> None:
        if self._away or self.serving.student != entry.student:
            student = self._candidate or self._open(entry.student)
            self._candidate = student  # closed by whoever gives up when the swap raises
            self._device.swap(student)
            self._candidate, self._away = None, False
        self._drop_candidate()
        self.serving = entry

    def _get_manifest(self, record: Record) -> release_pb2.Manifest:
        """The manifest of the wanted release, believed now."""
        try:
            kept = self._manifest_file.read()
        except IntegrityError:
            kept = b""
        # Asked anew at each try: what was believed yesterday may be revoked today.
        data = self._trusted.manifest(record.release, kept=kept)
        manifest = self._parse(data, record)
        if data != kept:
            self._manifest_file.write(data)
        if manifest.student == record.failed.student and record.release <= record.failed.release:
            msg = (
                f"the student of release {record.release} failed under release "
                f"{record.failed.release} already: publish a newer release"
            )
            raise ProbeError(msg)
        return manifest

    def _read_manifest(self, record: Record) -> release_pb2.Manifest:
        """The manifest kept on the disk: it was believed when the fetching began."""
        return self._parse(self._manifest_file.read(), record)

    def _parse(self, data: bytes, record: Record) -> release_pb2.Manifest:
        return parse(data, channel=self._trusted.channel, release=record.release)

    def _plan(self, manifest: release_pb2.Manifest, *, full: bool) -> tuple[Step, ...]:
        """What to do, from what is on the disk now: an altered base is seen here."""
        try:
            self._slots.check(manifest.student)
        except (IntegrityError, StorageError):
            pass
        else:
            return ()  # the slot is there: a release that brings an old student back
        folder = self._slots.folder(self.serving.student)
        return plan(manifest, _readable(folder), full=full)

    def _maker(self, step: Step, base: Path) -> Callable[[Path], None]:
        if step.download is None:
            return partial(link, base)
        path = self._downloads.path(step.download)
        if step.download.kind == "delta":
            return partial(delta.apply, base, path)
        # A copy of its own would cost a second time the space and the wear.
        return partial(link, path)


def _readable(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a bundle by its name; a bad block costs the file, not the update."""
    found = {}
    for name in FILES:
        try:
            found[name] = sha256_file(folder / name)
        except OSError as error:
            _log.warning("%s cannot be built upon, it is fetched: %s", folder / name, error)
    return found
