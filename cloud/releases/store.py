"""The release store: files by content, deltas between them, manifests, versions that grow.

A release exists from the moment its row is committed. A publish that dies before leaves nothing but
unused blobs, which the next attempt finds and uses. Devices believe it from the moment the TUF
repository lists its manifest: at once where the key of targets is here, else when people have
signed (:attr:`Release.signed`).
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Gauge

from cloud.releases.before_tuf import take_over
from cloud.releases.blobs import Blob, Blobs
from cloud.releases.bundles import BundleFolders
from cloud.releases.deltas import DeltaStore
from cloud.releases.repository import Repository
from cloud.releases.rows import ReleaseRows, path
from cloud.releases.tables import ReleaseRow
from edge.student import bundle as bundles
from edge.update import manifest as manifests
from protos.errors import IntegrityError, InvalidInputError
from protos.topics import check_name
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from prometheus_client import CollectorRegistry
    from sqlalchemy import Engine

    from cloud.releases.metadata import Lifetimes
    from edge.delta import Update

_log = logging.getLogger(__name__)

_DELTA_BASES = 2


@dataclass(frozen=True)
class Release:
    """One release."""

    channel: str
    version: int
    student: str
    """Digest of the bundle."""
    created_ms: int
    """UTC, milliseconds since 1970."""
    withdrawn: bool
    """It was rolled back: devices are not given it any more."""
    full_bytes: int
    """Of all files together: what a device without any of them fetches."""
    delta_bytes: int
    """What a device fetches that runs the release before."""
    manifest: release_pb2.Manifest
    signed: bool
    """Devices believe it; until then it waits for signatures."""


class ReleaseStore:
    """Publishes and finds releases; any thread may call it, one process per state folder."""

    def __init__(
        self,
        *,
        folder: Path,
        engine: Engine,
        clock: Callable[[], float],
        registry: CollectorRegistry,
        lifetimes: Lifetimes | None = None,
    ) -> None:
        """Open the store.

        Args:
            folder: the cloud's state folder; ``blobs/`` and ``bundles/`` in it are the store's.
            engine: from :func:`cloud.db.open_database`.
            clock: seconds since the epoch.
            registry: where the gauges of the newest release and of signed metadata go.
            lifetimes: how long signed metadata lasts.
        """
        self._rows = ReleaseRows(engine)
        self.blobs = Blobs(folder=folder / "blobs")
        self._bundles = BundleFolders(folder=folder / "bundles", blobs=self.blobs)
        self._repository = Repository(
            state=folder, clock=clock, registry=registry, lifetimes=lifetimes
        )
        self._clock = clock
        self._deltas = DeltaStore(blobs=self.blobs, engine=engine)
        self._lock = threading.Lock()
        self._delta_gauge = Gauge(
            "anabranch_delta_bytes",
            "Bytes that the newest release costs a device that runs the one before.",
            ["channel"],
            registry=registry,
        )
        self._unsigned_gauge = Gauge(
            "anabranch_releases_unsigned",
            "Releases that wait for the signature of somebody whose key is not here.",
            ["channel"],
            registry=registry,
        )
        self._full_gauge = Gauge(
            "anabranch_full_bytes",
            "Bytes of all files of the newest release.",
            ["channel"],
            registry=registry,
        )
        take_over(engine, self.blobs)
        self.sync()
        for channel in self.channels():
            self._show(self.latest(channel))

    def publish(
        self,
        bundle: Path,
        *,
        channel: str,
        canaries: Iterable[release_pb2.Canary],
        bounds: release_pb2.ProbeBounds,
        learned_from: Iterable[str] = (),
        gate: Iterable[release_pb2.GateCheck] = (),
        updates: Sequence[Update] = (),
        bases: Sequence[int] = (),
        above: int = 0,
        fallback: int = 0,
    ) -> Release:
        """Make a bundle the channel's newest release.

        Args:
            bundle: folder of the student's five files. Its files and the store's may be one on the
                disk (hard links): replace them if they must change, never write into them.
            channel: who gets it.
            canaries: prompts with the answers seen on these very files.
            bounds: what a device checks before it swaps.
            learned_from: ids of every demonstration in these weights.
            gate: what the gate found.
            updates: products that turned the newest release's codes into this bundle's: they make
                its delta small.
            bases: versions to build deltas from, besides the last two.
            above: the version is greater than this: the newest that any device is known to run,
                should the store have lost releases.
            fallback: the version whose content a rollback would bring back; 0: none. What that
                takes is signed with this release, so that no person is needed then.

        Raises:
            InvalidInputError: the name, a base or the bundle is not right, or the manifest is
                bigger than a device accepts.
            IntegrityError: a file of the bundle is missing.
            StorageError: the disk is full or failed; a later :meth:`sync` may sign it all the same.
        """
        check_name(channel, "channel")
        with self._lock:
            files = self._bundles.take_in(bundle)
            earlier = self._rows.versions(channel)
            before = [*earlier[:_DELTA_BASES], *bases]
            manifest = release_pb2.Manifest(
                channel=channel,
                version=max([above, *earlier[:1]]) + 1,
                student=bundles.digest_of(files),
                files=[release_pb2.File(name=f.name, sha256=f.sha256, size=f.size) for f in files],
                deltas=self._build_deltas(channel, before, files, updates),
                canaries=canaries,
                bounds=bounds,
                learned_from=learned_from,
                gate=gate,
                created_ms=int(self._clock() * 1000),
            )
            way_back = self._way_back(manifest, fallback) if fallback else None
            self._add(manifest, earlier, way_back)
        return self._added(channel, manifest.version)

    def republish(self, channel: str, version: int) -> Release:
        """Bring back an earlier release's content as the newest release: this is a rollback.

        Where the newest release named that version as its fallback this needs no new signature.

        Raises:
            InvalidInputError: there is no such release.
            IntegrityError: its files were damaged.
            StorageError: the disk is full or failed; see :meth:`publish`.
        """
        old = self.release(channel, version).manifest
        with self._lock:
            earlier = self._rows.versions(channel)
            row = self._rows.find(channel, earlier[0])
            back = None
            if row is not None and row.way_back:
                back = self._parse(channel, earlier[0] + 1, row.way_back)
            if back is None or back.student != old.student:
                newest = self.release(channel, earlier[0]).manifest
                back = self._way_back(newest, version)
            self._add(back, earlier, None)
        return self._added(channel, back.version)

    def withdraw(self, channel: str, version: int) -> None:
        """Give a release to no device any more. Twice is once."""
        self._rows.withdraw(channel, version)
        self._show(self.latest(channel))

    def sync(self) -> None:
        """Have the TUF repository list what may be released; call it every few seconds.

        Raises:
            InvalidInputError: a key that signs online is not there, or others may read it.
            StorageError: the disk is full or failed; the next call goes on.
        """
        self._repository.update(self._rows.wanted(), self.blobs.read_all)
        counts = dict.fromkeys(self.channels(), 0)
        for channel, version, manifest in self._rows.live():
            counts[channel] += not self._repository.lists(path(channel, version), manifest)
        for channel, count in counts.items():
            self._unsigned_gauge.labels(channel).set(count)

    def metadata(self, name: str) -> bytes | None:
        """Signed metadata by the name that TUF gives it; None if there is none.

        Raises:
            StorageError: the disk failed.
        """
        return self._repository.read(name)

    def withdrawn(self, channel: str, sha256: str) -> bool:
        """Whether a blob is the manifest of a release that was withdrawn, and of no other."""
        return self._rows.withdrawn(channel, sha256)

    def find(self, channel: str, version: int) -> Release | None:
        """The release; None if there is none.

        Raises:
            IntegrityError: its manifest is damaged.
        """
        row = self._rows.find(channel, version)
        return None if row is None else self._release(row)

    def release(self, channel: str, version: int) -> Release:
        """Like :meth:`find`, for who knows that there is one.

        Raises:
            InvalidInputError: there is none.
        """
        release = self.find(channel, version)
        if release is None:
            msg = (
                f"channel {channel!r} has no release {version}; "
                f"its newest is {max(self._rows.versions(channel), default='not there yet')}"
            )
            raise InvalidInputError(msg)
        return release

    def latest(self, channel: str) -> Release | None:
        """The channel's newest release that was not withdrawn, signed or not."""
        version = self._rows.latest(channel)
        return None if version is None else self.release(channel, version)

    def channels(self) -> list[str]:
        """Every channel that has a release."""
        return self._rows.channels()

    def blob_kind(self, channel: str, sha256: str) -> str | None:
        """``manifest``, ``file`` or ``delta`` if it is one of the channel's releases, else None."""
        return self._rows.kind(channel, sha256)

    def bundle_folder(self, channel: str, version: int) -> Path:
        """The release's bundle as a folder, to read from; made when it is not there yet.

        Raises:
            InvalidInputError: there is no such release.
            IntegrityError: a file was damaged.
            StorageError: the disk is full or failed.
        """
        manifest = self.release(channel, version).manifest
        with self._lock:
            return self._bundles.folder(manifest)

    def _build_deltas(
        self,
        channel: str,
        bases: Sequence[int],
        files: Sequence[bundles.BundleFile],
        updates: Sequence[Update],
    ) -> list[release_pb2.Delta]:
        deltas: dict[str, release_pb2.Delta] = {}
        for version in dict.fromkeys(bases):
            try:
                old = self.release(channel, version).manifest.files
                products = updates if version == bases[0] else ()
                for delta in self._deltas.between_bundles(old, files, products):
                    deltas.setdefault(delta.base_sha256, delta)
            except IntegrityError:
                # Damage to an old release must not stop new ones; the full file still works.
                _log.exception("no delta from release %d of channel %s", version, channel)
        return list(deltas.values())

    def _way_back(self, newest: release_pb2.Manifest, version: int) -> release_pb2.Manifest:
        """The manifest that makes an earlier release's content the one after ``newest``."""
        channel = newest.channel
        old = self.release(channel, version).manifest
        files = [bundles.BundleFile(f.name, f.sha256, f.size) for f in old.files]
        for file in files:
            self.blobs.check(file.sha256)
        back = release_pb2.Manifest()
        back.CopyFrom(old)
        back.version = newest.version + 1
        back.created_ms = int(self._clock() * 1000)
        del back.deltas[:]
        back.deltas.extend(self._deltas.between_bundles(newest.files, files))
        return back

    def _add(
        self,
        manifest: release_pb2.Manifest,
        earlier: Sequence[int],
        way_back: release_pb2.Manifest | None,
    ) -> None:
        """Commit a release: from here on it exists."""
        blob = self._put_manifest(manifest)
        back = Blob("", 0) if way_back is None else self._put_manifest(way_back)
        row = ReleaseRow(
            channel=manifest.channel,
            version=manifest.version,
            student=manifest.student,
            manifest=blob.sha256,
            manifest_bytes=blob.size,
            way_back=back.sha256,
            way_back_bytes=back.size,
            created_ms=manifest.created_ms,
            withdrawn=False,
            full_bytes=sum(f.size for f in manifest.files),
            delta_bytes=self._bytes_to_fetch(earlier[:1], manifest),
        )
        kinds: dict[str, str] = {}
        for each in (m for m in (way_back, manifest) if m is not None):
            kinds |= dict.fromkeys((d.sha256 for d in each.deltas), "delta")
            kinds |= dict.fromkeys((f.sha256 for f in each.files), "file")
        kinds |= dict.fromkeys((b.sha256 for b in (blob, back) if b.sha256), "manifest")
        self._rows.add(row, kinds)

    def _added(self, channel: str, version: int) -> Release:
        self.sync()
        release = self.release(channel, version)
        self._show(release)
        if not release.signed:
            _log.warning("release %d of channel %s waits to be signed", version, channel)
        return release

    def _put_manifest(self, manifest: release_pb2.Manifest) -> Blob:
        data = manifest.SerializeToString(deterministic=True)
        if len(data) > manifests.MAX_MANIFEST_BYTES:
            msg = (
                f"the manifest has {len(data)} bytes, devices accept "
                f"{manifests.MAX_MANIFEST_BYTES}: list fewer demonstrations or canaries"
            )
            raise InvalidInputError(msg)
        return self.blobs.put_bytes(data)

    def _bytes_to_fetch(self, before: Iterable[int], manifest: release_pb2.Manifest) -> int:
        """Of the cheapest way to these files from those of the release before."""
        try:
            old = [self.release(manifest.channel, version).manifest for version in before]
        except IntegrityError:  # logged when no delta could be built from it
            old = []
        has = {f.sha256 for m in old for f in m.files}
        deltas = {d.target_sha256: d.size for d in manifest.deltas if d.base_sha256 in has}
        return sum(deltas.get(f.sha256, f.size) for f in manifest.files if f.sha256 not in has)

    def _release(self, row: ReleaseRow) -> Release:
        manifest = Blob(row.manifest, row.manifest_bytes)
        return Release(
            channel=row.channel,
            version=row.version,
            student=row.student,
            created_ms=row.created_ms,
            withdrawn=row.withdrawn,
            full_bytes=row.full_bytes,
            delta_bytes=row.delta_bytes,
            manifest=self._parse(row.channel, row.version, row.manifest),
            signed=self._repository.lists(path(row.channel, row.version), manifest),
        )

    def _parse(self, channel: str, version: int, sha256: str) -> release_pb2.Manifest:
        try:
            data = self.blobs.read_all(sha256)
            return manifests.parse(data, channel=channel, release=version)
        except IntegrityError as error:
            msg = (
                f"the stored manifest of release {version} in channel {channel!r} is damaged "
                f"({error}): restore the state folder from one backup, or publish the bundle again"
            )
            raise IntegrityError(msg) from error

    def _show(self, release: Release | None) -> None:
        if release is not None:
            self._delta_gauge.labels(release.channel).set(release.delta_bytes)
            self._full_gauge.labels(release.channel).set(release.full_bytes)
