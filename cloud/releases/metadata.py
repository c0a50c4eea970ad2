"""Signed metadata of the four TUF roles: what it says, how long it lasts, whether it is signed.

No I/O but reading a file. Words are the specification's
(https://theupdateframework.github.io/specification/latest/).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp

from cloud.releases.blobs import Blob
from edge.delta.files import storage_errors
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from securesystemslib.signer import Signer

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
OFFLINE, ONLINE = (ROOT, TARGETS), (SNAPSHOT, TIMESTAMP)
ROLES = (*OFFLINE, *ONLINE)

_DAY_S = 86_400.0
_SHA256 = "sha256"

SignedT = TypeVar("SignedT", Root, Timestamp, Snapshot, Targets)


@dataclass(frozen=True, kw_only=True)
class Lifetimes:
    """Seconds from signing to expiry.

    The online roles' are how long somebody on the network can hold a device back unnoticed. The
    offline roles' are how often a person has to sign though nothing changed.
    """

    root: float = 365 * _DAY_S
    targets: float = 365 * _DAY_S
    snapshot: float = 7 * _DAY_S
    timestamp: float = 1 * _DAY_S

    def __post_init__(self) -> None:
        """Refuse what devices could never believe."""
        if min(self.root, self.targets, self.snapshot, self.timestamp) <= 0:
            msg = f"signed metadata must last longer than no time: {self}"
            raise InvalidInputError(msg)

    def expiry(self, role: str, now: float) -> datetime:
        """When metadata expires that is signed at ``now`` (seconds since the epoch)."""
        return datetime.fromtimestamp(now + self._of(role), UTC).replace(microsecond=0)

    def renew_from(self, role: str, expires: datetime) -> float:
        """Seconds since the epoch from which on metadata is signed anew.

        Online roles at half their life, so that a device's clock may be wrong by as much; offline
        roles at three quarters, so that people have the last quarter for it.
        """
        left = 0.5 if role in ONLINE else 0.25
        return expires.timestamp() - left * self._of(role)

    def _of(self, role: str) -> float:
        return float(getattr(self, role))


def load(path: Path, kind: type[SignedT]) -> Metadata[SignedT]:
    """Metadata in a file.

    Raises:
        IntegrityError: it is missing, damaged, or of another role.
        StorageError: the disk failed.
    """
    try:
        with storage_errors(f"reading {path}"):
            metadata = Metadata[SignedT].from_bytes(path.read_bytes() if path.exists() else b"")
    except RepositoryError as error:
        msg = f"{path} is missing or damaged ({error}): restore it from a backup"
        raise IntegrityError(msg) from error
    if not isinstance(metadata.signed, kind):
        msg = f"{path} is not the metadata of {kind.type}: restore it from a backup"
        raise IntegrityError(msg)
    return metadata


def verified(by: Root, role: str, metadata: Metadata[SignedT]) -> bool:
    """Whether as many keys as ``by`` asks of a role have signed."""
    return not missing(by, role, metadata)


def missing(by: Root, role: str, metadata: Metadata[SignedT]) -> int:
    """Signatures that are still needed for what ``by`` asks of a role."""
    result = by.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return result.missing


def missing_of_root(root: Metadata[Root], *, before: Root) -> int:
    """Signatures that a root still needs for what it and the one before ask."""
    payload, signatures = root.signed_bytes, root.signatures
    results = [r.get_verification_result(ROOT, payload, signatures) for r in (before, root.signed)]
    wanted = [r.missing for r in results]
    # One signature counts for both where its key is in both.
    both = len(results[0].unsigned.keys() & results[1].unsigned.keys())
    return sum(wanted) - min(*wanted, both)


def sign(
    metadata: Metadata[SignedT], role: str, signers: Iterable[Signer], *, roots: Iterable[Root]
) -> list[str]:
    """Add the signatures of every signer that one of the roots names for a role; their key ids."""
    entitled = {keyid for root in roots for keyid in root.roles[role].keyids}
    able = [s for s in signers if s.public_key.keyid in entitled]
    for signer in able:
        metadata.sign(signer, append=True)
    return [s.public_key.keyid for s in able]


def listed(targets: Targets) -> dict[str, Blob]:
    """The manifests that targets metadata lists, by path."""
    return {
        path: Blob(file.hashes.get(_SHA256, ""), file.length)
        for path, file in targets.targets.items()
    }


def listing(wanted: Mapping[str, Blob], *, version: int, expires: datetime) -> Targets:
    """Targets metadata that lists these manifests."""
    files = {
        path: TargetFile(blob.size, {_SHA256: blob.sha256}, path) for path, blob in wanted.items()
    }
    return Targets(version=version, expires=expires, targets=files)


def next_version(before: int, now: float) -> int:
    """The version after ``before``: the time in seconds, where that is higher.

    A cloud that was restored from a backup thus signs higher versions than those it has forgotten,
    and devices do not take it for a rollback attack.

    >>> next_version(7, 1_700_000_000.5), next_version(1_700_000_000, 5.0), next_version(0, 0.0)
    (1700000000, 1700000001, 1)
    """
    return max(before + 1, int(now))


def successor(root: Root, lifetimes: Lifetimes, now: float) -> Root:
    """The root of the next version, with the same keys."""
    new = copy.deepcopy(root)
    new.version += 1
    new.expires = lifetimes.expiry(ROOT, now)
    return new
