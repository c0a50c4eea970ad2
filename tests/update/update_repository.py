"""A TUF repository in memory that can be made to lie in every way that its keys allow.

It holds private keys and unsigned metadata; the ``publish_*`` methods sign a role and put its bytes
where devices read them. A test changes the metadata, or the bytes, between them.
"""

from __future__ import annotations

import copy
import hashlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

if TYPE_CHECKING:
    from pathlib import Path

DAY_S = 86_400.0
ROLES = ("root", "targets", "snapshot", "timestamp")


def signer(seed: str) -> CryptoSigner:
    """A key that is the same in every run."""
    raw = hashlib.sha256(seed.encode()).digest()
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(raw))


class TufRepository:
    """Roles, keys, and what devices read.

    Attributes:
        signers: who signs each role.
        files: signed metadata by name.
        blobs: targets by SHA-256.
    """

    def __init__(self, now: float, *, seed: str = "ours") -> None:
        self.signers = {role: [signer(f"{seed} {role}")] for role in ROLES}
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        expires = self.at(now + 365 * DAY_S)
        self.root = Root(expires=expires)
        for role in ROLES:
            self.root.add_key(self.signers[role][0].public_key, role)
        self.targets = Targets(expires=expires)
        self.snapshot = Snapshot(expires=self.at(now + 7 * DAY_S))
        self.timestamp = Timestamp(expires=self.at(now + DAY_S))
        for each in (self.root, self.targets, self.snapshot, self.timestamp):
            each.version = 0  # publishing counts up
        self.publish_root()
        self.publish()

    @staticmethod
    def at(seconds: float) -> datetime:
        """A time as metadata holds it."""
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=0)

    @property
    def trusted_root(self) -> bytes:
        """What a device ships with: the first root."""
        return self.files["1.root.json"]

    def add(self, path: str, data: bytes) -> None:
        """List a target."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.blobs[sha256] = data
        self.targets.targets[path] = TargetFile(len(data), {"sha256": sha256}, path)

    def publish(self) -> None:
        """Sign everything but the root anew."""
        self.publish_targets()
        self.publish_snapshot()
        self.publish_timestamp()

    def publish_root(self) -> None:
        """Sign the next root, by the keys of the one before as well."""
        self.root.version += 1
        self.root.consistent_snapshot = True
        self._publish(f"{self.root.version}.root.json", self.root, "root")

    def publish_targets(self) -> None:
        """Sign the list of targets."""
        self.targets.version += 1
        self._publish(f"{self.targets.version}.targets.json", self.targets, "targets")

    def publish_snapshot(self) -> None:
        """Sign a snapshot of the targets' version."""
        data = self.files[f"{self.targets.version}.targets.json"]
        metafile = MetaFile.from_data(self.targets.version, data, ["sha256"])
        self.snapshot.meta["targets.json"] = metafile
        self.snapshot.version += 1
        self._publish(f"{self.snapshot.version}.snapshot.json", self.snapshot, "snapshot")

    def publish_timestamp(self) -> None:
        """Sign a timestamp of the snapshot."""
        data = self.files[f"{self.snapshot.version}.snapshot.json"]
        self.timestamp.snapshot_meta = MetaFile.from_data(self.snapshot.version, data, ["sha256"])
        self.timestamp.version += 1
        self._publish("timestamp.json", self.timestamp, "timestamp")

    def rotate(self, role: str, seed: str) -> None:
        """Give a role another key, in a new root."""
        for old in self.root.roles[role].keyids[:]:
            self.root.revoke_key(old, role)
        new = signer(seed)
        self.root.add_key(new.public_key, role)
        before = self.signers["root"]
        self.signers[role] = [new]
        self.signers["root"] = [*before, new] if role == "root" else before
        self.publish_root()

    def state(self) -> dict[str, bytes]:
        """What devices could read at this moment: an attacker may keep a copy."""
        return copy.deepcopy(self.files)

    def dump(self, folder: Path) -> None:
        """Write everything out, to look at."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)

    def _publish(self, name: str, signed: Any, role: str) -> None:  # noqa: ANN401
        metadata = Metadata(copy.deepcopy(signed))
        for each in self.signers[role]:
            metadata.sign(each, append=True)
        self.files[name] = metadata.to_bytes()
