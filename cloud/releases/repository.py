"""The cloud's TUF repository: signs what it has the keys for, and lays out the rest to be signed.

Folder ``STATE/tuf``::

    metadata/   N.root.json, N.targets.json, N.snapshot.json, timestamp.json: what devices read
    root.json   the newest root: what a device is given as --trust
    to-sign/    what wants signatures of keys that are not here (see ceremony)

What is published follows from what is on the disk. A write that a power loss ends before it is
whole leaves what was published before, and the next :meth:`Repository.update` does it again.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from prometheus_client import Gauge
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, Targets, Timestamp

from cloud.releases import keys
from cloud.releases.ceremony import Ceremony
from cloud.releases.files import MetadataFiles
from cloud.releases.metadata import (
    ONLINE,
    ROLES,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    Lifetimes,
    listed,
    listing,
    missing,
    missing_of_root,
    next_version,
    sign,
    successor,
    verified,
)
from edge.delta.files import write_changed
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from prometheus_client import CollectorRegistry

    from cloud.releases.blobs import Blob

_log = logging.getLogger(__name__)


class Repository:
    """Root, targets, snapshot and timestamp of all channels. Any thread may call it."""

    def __init__(
        self,
        *,
        state: Path,
        clock: Callable[[], float],
        registry: CollectorRegistry,
        lifetimes: Lifetimes | None = None,
    ) -> None:
        """Open the repository, or make it with new keys where there has never been one.

        Args:
            state: the cloud's state folder: ``tuf/`` in it is the repository's, and what lies in
                ``keys/`` can sign here.
            clock: seconds since the epoch.
            registry: where the expiry of each role goes.
            lifetimes: of what is signed from now on.

        Raises:
            InvalidInputError: others may read a private key.
            IntegrityError: a file that cannot be made again is damaged.
            StorageError: the disk is full or failed.
        """
        folder = state / "tuf"
        self._files = MetadataFiles(folder / "metadata")
        self._for_devices = folder / "root.json"
        self._ceremony = Ceremony(folder / "to-sign")
        self._keys = state / "keys"
        self._clock = clock
        self._lifetimes = lifetimes or Lifetimes()
        self._lock = threading.RLock()
        self._seen: object = None
        self._due = 0.0
        self._expires = Gauge(
            "anabranch_trust_expires_timestamp_seconds",
            "When the signed metadata of a role expires",
            ["role"],
            registry=registry,
        )
        if not self._files.versions(ROOT):
            self._create()
        self._root = self._files.root()
        self._give_out()
        self._targets = self._files.targets(self._root.signed)
        self._snapshot = self._files.snapshot()
        self._timestamp = self._files.timestamp()
        self._listed = listed(self._targets.signed)

    def lists(self, path: str, manifest: Blob) -> bool:
        """Whether devices believe this manifest under this path."""
        with self._lock:
            return self._listed.get(path) == manifest

    def read(self, name: str) -> bytes | None:
        """A file of metadata by the name that TUF gives it; None if there is none.

        Raises:
            StorageError: the disk failed.
        """
        with self._lock:
            return self._files.read(name)

    def unsigned(self) -> Mapping[str, int]:
        """Roles with something to sign, and how many signatures each wants yet."""
        with self._lock:
            root, targets = self._proposed()
            judge = root or self._root
            found = {}
            if root is not None:
                found[ROOT] = missing_of_root(root, before=self._root.signed)
            if targets is not None:
                found[TARGETS] = missing(judge.signed, TARGETS, targets)
            return found

    def update(self, wanted: Mapping[str, Blob], read: Callable[[str], bytes]) -> None:
        """Bring what is published to what is wanted, as far as keys and signatures are here.

        Call it when something has changed, and every few seconds: it takes in signatures that were
        brought back, and signs anew before anything expires.

        Args:
            wanted: the manifests that devices may be told of, by path.
            read: the bytes of a manifest by its SHA-256.

        Raises:
            InvalidInputError: others may read a private key.
            StorageError: the disk is full or failed; the next call goes on.
        """
        with self._lock:
            now = self._clock()
            seen = (dict(wanted), self._ceremony.stamps(), self._key_files())
            if seen == self._seen and now < self._due:
                return
            self._seen = None
            signers = keys.signers(self._keys)
            while True:
                root, targets = self._proposed()
                root = self._propose_root(root, now)
                targets = self._propose_targets(targets, wanted, root or self._root, now)
                roots = [r.signed for r in (self._root, root) if r is not None]
                if root is not None:
                    sign(root, ROOT, signers.values(), roots=roots)
                if targets is not None:
                    sign(targets, TARGETS, signers.values(), roots=roots)
                # What people signed may be older than what is wanted by now: then once more.
                if not self._publish(root, targets, now, signers.keys()):
                    break
            self._renew_online(now, list(signers.values()))
            self._show()
            if self._ceremony.stamps() != seen[1]:
                return  # somebody writes there at this moment: the next call looks at it
            self._lay_out(root, targets, read)
            # As it is on the disk now; what was laid out by this call is not news for the next.
            self._seen = (*seen[:1], self._ceremony.stamps(), *seen[2:])
            self._due = min(self._renewals())

    # Proposals: what is to be signed.

    def _proposed(self) -> tuple[Metadata[Root] | None, Metadata[Targets] | None]:
        """What lies in the folder for signing and can still be published."""
        root = self._ceremony.proposed(Root)
        if root is not None and root.signed.version != self._root.signed.version + 1:
            root = None
        targets = self._ceremony.proposed(Targets)
        if targets is not None and targets.signed.version <= self._targets.signed.version:
            targets = None
        return root, targets

    def _propose_root(self, proposed: Metadata[Root] | None, now: float) -> Metadata[Root] | None:
        if proposed is not None or now < self._renewal(self._root):
            return proposed
        return Metadata(successor(self._root.signed, self._lifetimes, now))

    def _propose_targets(
        self,
        proposed: Metadata[Targets] | None,
        wanted: Mapping[str, Blob],
        judge: Metadata[Root],
        now: float,
    ) -> Metadata[Targets] | None:
        if proposed is not None and self._may_replace(proposed, now):
            return proposed  # whatever is wanted by now: people have signed it
        needed = (
            not wanted.items() <= self._listed.items()
            or now >= self._renewal(self._targets)
            or not verified(judge.signed, TARGETS, self._targets)
        )
        if not needed:
            return None
        if proposed is not None and wanted.items() <= listed(proposed.signed).items():
            return proposed
        before = max(self._targets.signed.version, proposed.signed.version if proposed else 0)
        expires = self._lifetimes.expiry(TARGETS, now)
        return Metadata(listing(wanted, version=next_version(before, now), expires=expires))

    def _may_replace(self, targets: Metadata[Targets], now: float) -> bool:
        """Whether targets are signed, and say something that those in force do not."""
        news = listed(targets.signed) != self._listed or now >= self._renewal(self._targets)
        return news and verified(self._root.signed, TARGETS, targets)

    def _lay_out(
        self,
        root: Metadata[Root] | None,
        targets: Metadata[Targets] | None,
        read: Callable[[str], bytes],
    ) -> None:
        proposed: dict[str, Metadata[Any]] = {}
        new: dict[str, Callable[[], bytes]] = {}
        if root is not None:
            proposed[ROOT] = root
        if targets is not None:
            proposed[TARGETS] = targets
            for path, blob in listed(targets.signed).items():
                if self._listed.get(path) != blob:
                    new[blob.sha256] = lambda sha256=blob.sha256: read(sha256)  # type: ignore[misc]
        published = {ROOT: self._root.to_bytes(), TARGETS: self._targets.to_bytes()}
        before = self._ceremony.stamps()
        self._ceremony.put(proposed, published=published, new=new)
        if proposed and self._ceremony.stamps() != before:
            _log.warning(
                "to be signed: %s. Carry STATE/tuf/to-sign to who has the keys, run `anabranch "
                "release sign` on it, and bring it back to its place",
                ", ".join(f"{role} {m.signed.version}" for role, m in proposed.items()),
            )

    # Publishing: what has its signatures.

    def _publish(
        self,
        root: Metadata[Root] | None,
        targets: Metadata[Targets] | None,
        now: float,
        here: Collection[str],
    ) -> bool:
        """Publish what is signed; whether anything was."""
        before = (self._root, self._targets)
        if root is not None and self._may_follow(root, here):
            fits = targets is not None and verified(root.signed, TARGETS, targets)
            # A root that does not know who signed the targets in force needs others at once.
            if fits or verified(root.signed, TARGETS, self._targets):
                if targets is not None and fits:
                    self._publish_targets(targets)
                self._publish_root(root)
        if targets is not None and targets is not self._targets and self._may_replace(targets, now):
            self._publish_targets(targets)
        return before != (self._root, self._targets)

    def _may_follow(self, root: Metadata[Root], here: Collection[str]) -> bool:
        new = root.signed
        if not (verified(self._root.signed, ROOT, root) and verified(new, ROOT, root)):
            return False
        for role in ONLINE:
            if len(set(here) & set(new.roles[role].keyids)) < new.roles[role].threshold:
                _log.error(
                    "root %d is signed, but the keys that it names for %s are not in %s: put them "
                    "there, or propose another root",
                    *(new.version, role, self._keys),
                )
                return False
        return True

    def _publish_root(self, root: Metadata[Root]) -> None:
        self._files.write(root)
        self._root = root
        self._give_out()
        _log.warning("root %d is in force", root.signed.version)

    def _publish_targets(self, targets: Metadata[Targets]) -> None:
        self._files.write(targets)
        self._targets = targets
        self._listed = listed(targets.signed)
        _log.info("targets %d: %d manifests", targets.signed.version, len(self._listed))

    def _renew_online(self, now: float, signers: list[Any]) -> None:
        """Sign snapshot and timestamp where they are not what they should be."""
        meta = {"targets.json": self._files.metafile(self._targets)}
        snapshot, root = self._snapshot, [self._root.signed]
        if snapshot is None or snapshot.signed.meta != meta or self._stale(snapshot, now):
            before = max(self._files.versions(SNAPSHOT), default=0)
            version = next_version(before, now)
            expires = self._lifetimes.expiry(SNAPSHOT, now)
            snapshot = Metadata(Snapshot(version=version, expires=expires, meta=meta))
            sign(snapshot, SNAPSHOT, signers, roots=root)
            self._check_signed(snapshot)
            self._files.write(snapshot)
            self._snapshot = snapshot
        metafile = self._files.metafile(snapshot)
        timestamp = self._timestamp
        if (
            timestamp is None
            or timestamp.signed.snapshot_meta != metafile
            or self._stale(timestamp, now)
        ):
            version = next_version(timestamp.signed.version if timestamp else 0, now)
            expires = self._lifetimes.expiry(TIMESTAMP, now)
            timestamp = Metadata(Timestamp(version, expires=expires, snapshot_meta=metafile))
            sign(timestamp, TIMESTAMP, signers, roots=root)
            self._check_signed(timestamp)
            self._files.write(timestamp)
            self._timestamp = timestamp

    def _check_signed(self, metadata: Metadata[Any]) -> None:
        role = metadata.signed.type
        if not verified(self._root.signed, role, metadata):
            msg = (
                f"the key of {role} is not in {self._keys}: put it back, or devices believe "
                "nothing any more once the metadata that they have expires"
            )
            raise InvalidInputError(msg)

    def _stale(self, metadata: Metadata[Any], now: float) -> bool:
        role = metadata.signed.type
        return now >= self._renewal(metadata) or not verified(self._root.signed, role, metadata)

    def _renewal(self, metadata: Metadata[Any]) -> float:
        return self._lifetimes.renew_from(metadata.signed.type, metadata.signed.expires)

    def _renewals(self) -> list[float]:
        """When each role is due; what waits for people is not done again and again for that."""
        waiting = self.unsigned()
        documents = (self._root, self._targets, self._snapshot, self._timestamp)
        return [
            self._renewal(m) for m in documents if m is not None and m.signed.type not in waiting
        ]

    def _create(self) -> None:
        """Keys where there are none, and the first metadata. The root is written last."""
        now = self._clock()
        root = Root(version=1, expires=self._lifetimes.expiry(ROOT, now))
        made = {}
        for role in ROLES:
            path = self._keys / f"{role}{keys.PRIVATE}"
            made[role] = keys.load(path) if path.exists() else keys.make(path)
            root.add_key(made[role].public_key, role)
        expires = self._lifetimes.expiry(TARGETS, now)
        targets = Metadata(listing({}, version=next_version(0, now), expires=expires))
        targets.sign(made[TARGETS])
        self._files.write(targets)
        signed = Metadata(root)
        signed.sign(made[ROOT])
        self._files.write(signed)
        _log.warning(
            "new keys are in %s. Who has them can make devices run anything: keep copies of "
            "root.pem and targets.pem elsewhere, and take both away from this machine before it "
            "matters (docs/how-to/keys.md)",
            self._keys,
        )

    def _key_files(self) -> tuple[tuple[str, int], ...]:
        files = sorted(self._keys.glob(f"*{keys.PRIVATE}"))
        return tuple((path.name, path.stat().st_mtime_ns) for path in files)

    def _give_out(self) -> None:
        write_changed(self._for_devices, self._root.to_bytes())

    def _show(self) -> None:
        for metadata in (self._root, self._targets, self._snapshot, self._timestamp):
            if metadata is not None:
                signed: Signed = metadata.signed
                self._expires.labels(signed.type).set(signed.expires.timestamp())
