"""Signing away from the cloud: the folder that is carried to an offline machine and back.

``STATE/tuf/to-sign``::

    root.json, targets.json   what wants signatures; only what does is there
    published/                the same two as they are in force, to compare with
    manifests/SHA256          every manifest that targets.json lists and the published one does not

The cloud writes it, and takes from it whatever has enough signatures, however they got there.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuf.api.metadata import Metadata, Root, Targets

from cloud.releases.metadata import (
    OFFLINE,
    ROLES,
    ROOT,
    SignedT,
    listed,
    load,
    missing,
    missing_of_root,
    sign,
)
from edge.delta.files import storage_errors, write_atomic, write_changed
from edge.update import manifest as manifests
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from securesystemslib.signer import Signer

_log = logging.getLogger(__name__)

PUBLISHED, MANIFESTS = "published", "manifests"
_KINDS: dict[str, type[Root | Targets]] = {ROOT: Root, Targets.type: Targets}
_SHORT = 12


class Ceremony:
    """The cloud's side of the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def stamps(self) -> tuple[tuple[int, ...], ...]:
        """Other numbers whenever somebody has written to what wants signatures."""
        return tuple(_stamp(self._folder / f"{role}.json") for role in OFFLINE)

    def proposed(self, kind: type[SignedT]) -> Metadata[SignedT] | None:
        """What is proposed for a role, if it is there and can be read."""
        path = self._folder / f"{kind.type}.json"
        if not path.exists():
            return None
        try:
            return load(path, kind)
        except IntegrityError as error:  # half copied, perhaps: the rest may come
            _log.warning("not taken: %s", error)
            return None

    def put(
        self,
        proposed: Mapping[str, Metadata[Any]],
        *,
        published: Mapping[str, bytes],
        new: Mapping[str, Callable[[], bytes]],
    ) -> None:
        """Lay out what wants signatures, and take away what does not any more.

        Args:
            proposed: by role.
            published: the metadata in force, by role.
            new: the bytes of manifests to look at, by SHA-256.

        Raises:
            StorageError: the disk is full or failed.
        """
        with storage_errors(f"laying out {self._folder}"):
            for role in OFFLINE:
                if role not in proposed:
                    (self._folder / f"{role}.json").unlink(missing_ok=True)
            if not proposed:
                shutil.rmtree(self._folder, ignore_errors=True)
                return
            for part in (PUBLISHED, MANIFESTS):
                (self._folder / part).mkdir(parents=True, exist_ok=True)
            self._put_manifests(new)
            for role, data in published.items():
                write_changed(self._folder / PUBLISHED / f"{role}.json", data)
            for role, metadata in proposed.items():
                write_changed(self._folder / f"{role}.json", metadata.to_bytes())

    def _put_manifests(self, new: Mapping[str, Callable[[], bytes]]) -> None:
        folder = self._folder / MANIFESTS
        for left in folder.iterdir():
            if left.name not in new:
                left.unlink()
        for sha256, read in new.items():
            if not (folder / sha256).exists():
                write_atomic(folder / sha256, read())


def _stamp(path: Path) -> tuple[int, ...]:
    if not path.exists():
        return ()
    state = path.stat()
    return (state.st_mtime_ns, state.st_ctime_ns, state.st_size)


@dataclass(frozen=True)
class Wanting:
    """Something that wants signatures.

    Attributes:
        role: whose metadata it is.
        lines: what a signature would say, for people.
        missing: signatures that it wants yet.
    """

    role: str
    lines: tuple[str, ...]
    missing: int


def look(folder: Path) -> list[Wanting]:
    """What in a folder wants signatures.

    Raises:
        InvalidInputError: it is no such folder.
        IntegrityError: a file is damaged, or a manifest is not the one that is listed.
        StorageError: a file cannot be read.
    """
    return [_wanting(role, metadata, folder) for role, metadata in _open(folder)]


def add_signature(folder: Path, signer: Signer) -> list[Wanting]:
    """Sign what the key may sign in a folder; what it signed.

    Raises:
        InvalidInputError: it is no such folder, or the key signs nothing in it.
        IntegrityError: a file is damaged, or a manifest is not the one that is listed.
        StorageError: a file cannot be read or written.
    """
    signed = []
    for role, metadata in _open(folder):
        _wanting(role, metadata, folder)  # nothing is signed that cannot be looked at
        if sign(metadata, role, [signer], roots=_roots(folder)):
            write_atomic(folder / f"{role}.json", metadata.to_bytes())
            signed.append(_wanting(role, metadata, folder))
    if not signed:
        msg = (
            f"key {signer.public_key.keyid[:_SHORT]} is not one that {folder} asks for: "
            "`anabranch keys list` names them"
        )
        raise InvalidInputError(msg)
    return signed


def _open(folder: Path) -> Iterator[tuple[str, Metadata[Any]]]:
    there = [role for role in OFFLINE if (folder / f"{role}.json").exists()]
    if not there:
        msg = f"{folder} holds nothing to sign: give the folder STATE/tuf/to-sign or a copy of it"
        raise InvalidInputError(msg)
    for role in there:
        yield role, load(folder / f"{role}.json", _KINDS[role])


def _roots(folder: Path) -> list[Root]:
    """The root in force, and the one that is proposed."""
    paths = (folder / PUBLISHED / "root.json", folder / "root.json")
    return [load(path, Root).signed for path in paths if path.exists()]


def _wanting(role: str, metadata: Metadata[Any], folder: Path) -> Wanting:
    roots = _roots(folder)
    signed = metadata.signed
    if role == ROOT:
        wanted = missing_of_root(metadata, before=roots[0])
    else:
        wanted = missing(roots[-1], role, metadata)
    lines = [f"{role} {signed.version}, expires {signed.expires:%Y-%m-%d}"]
    lines += _of_root(signed, roots[0]) if isinstance(signed, Root) else _of_targets(signed, folder)
    return Wanting(role, tuple(lines), wanted)


def _of_root(root: Root, before: Root) -> Iterator[str]:
    for role in ROLES:
        now, then = root.roles[role], before.roles[role]
        added = sorted(set(now.keyids) - set(then.keyids))
        gone = sorted(set(then.keyids) - set(now.keyids))
        if added or gone or now.threshold != then.threshold:
            yield (
                f"  {role}: {now.threshold} of {len(now.keyids)} keys sign (before: "
                f"{then.threshold} of {len(then.keyids)})"
            )
        yield from (f"    new key {key[:_SHORT]}" for key in added)
        yield from (f"    key {key[:_SHORT]} signs no more" for key in gone)


def _of_targets(targets: Targets, folder: Path) -> Iterator[str]:
    before = listed(load(folder / PUBLISHED / "targets.json", Targets).signed)
    now = listed(targets)
    for path in sorted(now.keys() - before.keys() | _changed(now, before)):
        yield f"  {_manifest(folder, path, now[path].sha256)}"
    yield from (f"  {path} is not listed any more" for path in sorted(before.keys() - now.keys()))


def _changed(now: Mapping[str, object], before: Mapping[str, object]) -> set[str]:
    return {path for path in now.keys() & before.keys() if now[path] != before[path]}


def _manifest(folder: Path, path: str, sha256: str) -> str:
    """What a manifest says, once it is sure that it is the one that is listed."""
    file = folder / MANIFESTS / sha256
    with storage_errors(f"reading {file}"):
        data = file.read_bytes() if file.exists() else b""
    if hashlib.sha256(data).hexdigest() != sha256:
        msg = f"{file}, the manifest of {path}, is missing or another one: copy the folder again"
        raise IntegrityError(msg)
    channel, _, version = path.rpartition("/")
    if not version.isdecimal():
        msg = f"targets.json lists {path!r}, which is no release: do not sign it"
        raise IntegrityError(msg)
    manifest = manifests.parse(data, channel=channel, release=int(version))
    gate = ", ".join(f"{c.name} {c.value:.3f} (bound {c.bound:.3f})" for c in manifest.gate)
    return (
        f"release {path}: student {manifest.student[:_SHORT]}, learnt from "
        f"{len(manifest.learned_from)} demonstrations; gate: {gate or 'none'}"
    )
