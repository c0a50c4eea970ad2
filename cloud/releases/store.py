"""The release store: files by content, deltas between them, signed manifests, versions that grow.

A release is visible from the moment its row is committed, which is the last thing that
:meth:`ReleaseStore.publish` does. A publish that dies before leaves nothing but unused blobs, which
the next attempt finds and uses.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import Gauge
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError as DuplicateError

from cloud.db import create_tables, read, write
from cloud.releases.blobs import Blobs
from cloud.releases.deltas import DeltaStore
from cloud.releases.tables import DeltaRow, ReleaseBlobRow, ReleaseRow
from edge.delta.files import fsync_folder, storage_errors
from edge.student import bundle as bundles
from protos.errors import IntegrityError, InvalidInputError, SignatureError, StorageError
from protos.topics import check_name
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from prometheus_client import CollectorRegistry
    from sqlalchemy import Engine

    from cloud.releases.keys import Signer
    from edge.delta import Update

_log = logging.getLogger(__name__)

WEIGHTS, LAYOUT = "weights.bin", "student.json"
_DELTA_BASES = 2


@dataclass(frozen=True)
class Release:
    """One published release."""

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
    signed: bytes
    """Serialized SignedManifest, as devices get it."""


class ReleaseStore:
    """Publishes and finds releases; any thread may call it, one process per state folder."""

    def __init__(
        self,
        *,
        folder: Path,
        engine: Engine,
        signer: Signer,
        clock: Callable[[], float],
        registry: CollectorRegistry,
    ) -> None:
        """Open the store.

        Args:
            folder: the cloud's state folder; ``blobs/`` and ``bundles/`` in it are the store's.
            engine: from :func:`cloud.db.open_database`.
            signer: signs manifests.
            clock: seconds since the epoch.
            registry: where the gauges of the newest release go.
        """
        create_tables(engine, ReleaseRow, ReleaseBlobRow, DeltaRow)
        self.blobs = Blobs(folder=folder / "blobs")
        self._bundles = folder / "bundles"
        self._engine = engine
        self._signer = signer
        self._clock = clock
        self._deltas = DeltaStore(blobs=self.blobs, engine=engine)
        self._lock = threading.Lock()
        self._delta_gauge = Gauge(
            "anabranch_delta_bytes",
            "Bytes that the newest release costs a device that runs the one before.",
            ["channel"],
            registry=registry,
        )
        self._full_gauge = Gauge(
            "anabranch_full_bytes",
            "Bytes of all files of the newest release.",
            ["channel"],
            registry=registry,
        )
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
        expires_ms: int = 0,
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
            expires_ms: UTC, milliseconds since 1970; 0: never.

        Raises:
            InvalidInputError: the name, a base or the bundle is not right, or the manifest is
                bigger than a device accepts.
            IntegrityError: a file of the bundle is missing.
            StorageError: the disk is full or failed; nothing was published.
        """
        check_name(channel, "channel")
        with self._lock:
            files = self._take_in(bundle)
            earlier = self._versions(channel)
            before = [*earlier[:_DELTA_BASES], *bases]
            deltas = self._build_deltas(channel, before, files, updates)
            manifest = release_pb2.Manifest(
                channel=channel,
                version=max([above, *earlier[:1]]) + 1,
                student=bundles.digest_of(files),
                files=[release_pb2.File(name=f.name, sha256=f.sha256, size=f.size) for f in files],
                deltas=deltas,
                canaries=canaries,
                bounds=bounds,
                learned_from=learned_from,
                gate=gate,
                created_ms=int(self._clock() * 1000),
                expires_ms=expires_ms,
            )
            signed = self._signer.sign(manifest.SerializeToString())
            row = ReleaseRow(
                channel=channel,
                version=manifest.version,
                student=manifest.student,
                signed=signed,
                created_ms=manifest.created_ms,
                withdrawn=False,
                full_bytes=sum(f.size for f in files),
                delta_bytes=self._bytes_to_fetch(earlier[:1], manifest),
            )
            self._commit(row, manifest)
        release = self.release(channel, manifest.version)
        self._show(release)
        return release

    def republish(self, channel: str, version: int, *, above: int = 0) -> Release:
        """Bring back an earlier release's content as the newest release: this is a rollback.

        Raises:
            InvalidInputError: there is no such release.
            IntegrityError: its files were damaged.
            StorageError: the disk is full or failed; nothing was published.
        """
        old = self.release(channel, version).manifest
        return self.publish(
            self.bundle_folder(channel, version),
            channel=channel,
            canaries=old.canaries,
            bounds=old.bounds,
            learned_from=old.learned_from,
            gate=old.gate,
            above=above,
        )

    def withdraw(self, channel: str, version: int) -> None:
        """Give a release to no device any more. Twice is once."""
        with write(self._engine) as session:
            row = session.get(ReleaseRow, (channel, version))
            if row is not None:
                row.withdrawn = True
        self._show(self.latest(channel))

    def find(self, channel: str, version: int) -> Release | None:
        """The release, its signature checked; None if there is none.

        Raises:
            IntegrityError: what is stored is damaged, or signed by another key.
        """
        with read(self._engine) as session:
            row = session.get(ReleaseRow, (channel, version))
            if row is None:
                return None
            session.expunge(row)
        return self._release(row)

    def release(self, channel: str, version: int) -> Release:
        """Like :meth:`find`, for who knows that there is one.

        Raises:
            InvalidInputError: there is none.
        """
        release = self.find(channel, version)
        if release is None:
            msg = (
                f"channel {channel!r} has no release {version}; "
                f"its newest is {max(self._versions(channel), default='not there yet')}"
            )
            raise InvalidInputError(msg)
        return release

    def latest(self, channel: str) -> Release | None:
        """The channel's newest release that was not withdrawn."""
        query = select(func.max(ReleaseRow.version)).where(
            ReleaseRow.channel == channel, ReleaseRow.withdrawn.is_(False)
        )
        with read(self._engine) as session:
            version = session.scalar(query)
        return None if version is None else self.release(channel, version)

    def channels(self) -> list[str]:
        """Every channel that has a release."""
        with read(self._engine) as session:
            return list(session.scalars(select(ReleaseRow.channel).distinct()))

    def blob_kind(self, channel: str, sha256: str) -> str | None:
        """``file`` or ``delta`` if a release of the channel names the blob, else None."""
        with read(self._engine) as session:
            row = session.get(ReleaseBlobRow, (channel, sha256))
            return None if row is None else row.kind

    def bundle_folder(self, channel: str, version: int) -> Path:
        """The release's bundle as a folder, to read from; made when it is not there yet.

        Raises:
            InvalidInputError: there is no such release.
            IntegrityError: a file was damaged.
            StorageError: the disk is full or failed.
        """
        manifest = self.release(channel, version).manifest
        folder = self._bundles / manifest.student
        with self._lock, storage_errors(f"making the bundle folder {folder}"):
            if _is_whole(folder, manifest):
                return folder
            making = folder.with_name(f"{manifest.student}.tmp")
            for left in (making, folder):
                if left.exists():
                    shutil.rmtree(left)
            making.mkdir(parents=True)
            for file in manifest.files:
                self.blobs.copy_out(file.sha256, making / file.name)
            making.rename(folder)
            fsync_folder(self._bundles)
        return folder

    def _take_in(self, bundle: Path) -> list[bundles.BundleFile]:
        missing = [name for name in bundles.FILES if not (bundle / name).is_file()]
        if missing:
            msg = f"{bundle} is not a whole student bundle: {', '.join(missing)} is missing"
            raise IntegrityError(msg)
        bundles.read_harness(bundle)
        blobs = {name: self.blobs.put(bundle / name) for name in bundles.FILES}
        return [bundles.BundleFile(name, blob.sha256, blob.size) for name, blob in blobs.items()]

    def _build_deltas(
        self,
        channel: str,
        bases: Sequence[int],
        files: Iterable[bundles.BundleFile],
        updates: Sequence[Update],
    ) -> list[release_pb2.Delta]:
        shas = {f.name: f.sha256 for f in files}
        target, layout = shas[WEIGHTS], self._layout(shas[LAYOUT])
        deltas: dict[str, release_pb2.Delta | None] = {target: None}
        for version in dict.fromkeys(bases):
            try:
                old = {f.name: f.sha256 for f in self.release(channel, version).manifest.files}
                base = old[WEIGHTS]
                if base not in deltas:
                    before = self._layout(old[LAYOUT])
                    deltas[base] = self._deltas.between(
                        base,
                        target,
                        base_layout=before,
                        target_layout=layout,
                        updates=updates if version == bases[0] else (),
                    )
            except IntegrityError:
                # Damage to an old release must not stop new ones; the full file still works.
                _log.exception("no delta from release %d of channel %s", version, channel)
        return [delta for delta in deltas.values() if delta is not None]

    def _layout(self, sha256: str) -> dict[str, Any]:
        """What a ``student.json`` says; nothing if it is none that this program understands."""
        try:
            layout = json.loads(self.blobs.path(sha256).read_bytes())
        except (OSError, ValueError):
            return {}
        return layout if isinstance(layout, dict) else {}

    def _commit(self, row: ReleaseRow, manifest: release_pb2.Manifest) -> None:
        kinds = dict.fromkeys((d.sha256 for d in manifest.deltas), "delta")
        kinds |= dict.fromkeys((f.sha256 for f in manifest.files), "file")
        try:
            with write(self._engine) as session:
                session.add(row)
                for sha256, kind in kinds.items():
                    session.merge(
                        ReleaseBlobRow(channel=manifest.channel, sha256=sha256, kind=kind)
                    )
        except DuplicateError as error:
            msg = (
                f"release {manifest.version} of channel {manifest.channel!r} was published by "
                "another process meanwhile: run one cloud per state folder"
            )
            raise StorageError(msg) from error

    def _bytes_to_fetch(self, before: Iterable[int], manifest: release_pb2.Manifest) -> int:
        """Of the cheapest way to these files from those of the release before."""
        try:
            old = [self.release(manifest.channel, version).manifest for version in before]
        except IntegrityError:  # logged when no delta could be built from it
            old = []
        has = {f.sha256 for m in old for f in m.files}
        deltas = {d.target_sha256: d.size for d in manifest.deltas if d.base_sha256 in has}
        return sum(deltas.get(f.sha256, f.size) for f in manifest.files if f.sha256 not in has)

    def _versions(self, channel: str) -> list[int]:
        """All versions of a channel, the newest first."""
        query = select(ReleaseRow.version).where(ReleaseRow.channel == channel)
        with read(self._engine) as session:
            return list(session.scalars(query.order_by(ReleaseRow.version.desc())))

    def _release(self, row: ReleaseRow) -> Release:
        try:
            manifest = self._signer.verify(row.signed, channel=row.channel)
        except SignatureError as error:
            msg = (
                f"the stored manifest of release {row.version} in channel {row.channel!r} is "
                f"damaged, or was signed by another key ({error}): restore the state folder's "
                "database and keys from one backup, or publish the bundle again"
            )
            raise IntegrityError(msg) from error
        return Release(
            channel=row.channel,
            version=row.version,
            student=row.student,
            created_ms=row.created_ms,
            withdrawn=row.withdrawn,
            full_bytes=row.full_bytes,
            delta_bytes=row.delta_bytes,
            manifest=manifest,
            signed=row.signed,
        )

    def _show(self, release: Release | None) -> None:
        if release is not None:
            self._delta_gauge.labels(release.channel).set(release.delta_bytes)
            self._full_gauge.labels(release.channel).set(release.full_bytes)


def _is_whole(folder: Path, manifest: release_pb2.Manifest) -> bool:
    return all(
        (path := folder / f.name).is_file() and path.stat().st_size == f.size
        for f in manifest.files
    )
