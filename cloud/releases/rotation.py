"""Changing who may sign: proposes the next root, which the keys of this one have to sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuf.api.metadata import Metadata, Root

from cloud.releases.ceremony import Ceremony
from cloud.releases.files import open_files
from cloud.releases.metadata import ROLES, ROOT, TARGETS, Lifetimes, successor
from edge.delta.files import storage_errors, write_atomic
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from securesystemslib.signer import SSlibKey

_SHORT = 8


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is to be different: keys by their ids, of which eight digits are enough."""

    roles: Sequence[str]
    add: Sequence[SSlibKey] = ()
    remove: Sequence[str] = ()
    threshold: int | None = None


def propose(state: Path, change: Change, *, lifetimes: Lifetimes, now: float) -> Metadata[Root]:
    """Lay the next root out to be signed; a proposal that waits already is changed further.

    The cloud adds the signatures that it has keys for, and takes the root over as soon as there
    are enough.

    Args:
        state: the cloud's state folder.
        change: what is to be different.
        lifetimes: how long the new root lasts.
        now: seconds since the epoch.

    Raises:
        InvalidInputError: a role or key is not known, or too few keys would be left.
        IntegrityError: the root in force is damaged.
        StorageError: the disk is full or failed.
    """
    files = open_files(state)
    root = files.root().signed
    waiting = Ceremony(state / "tuf" / "to-sign").proposed(Root)
    goes_on = waiting is not None and waiting.signed.version == root.version + 1
    new = waiting.signed if waiting and goes_on else successor(root, lifetimes, now)
    _apply(new, change)
    proposed = Metadata(new)
    folder = state / "tuf" / "to-sign"
    with storage_errors(f"proposing a root in {folder}"):
        (folder / "published").mkdir(parents=True, exist_ok=True)
    for role, data in ((ROOT, files.root()), (TARGETS, files.targets(root))):
        write_atomic(folder / "published" / f"{role}.json", data.to_bytes())
    write_atomic(folder / "root.json", proposed.to_bytes())
    return proposed


def _apply(root: Root, change: Change) -> None:
    for role in change.roles:
        if role not in ROLES:
            msg = f"{role!r} is no role: give one of {', '.join(ROLES)}"
            raise InvalidInputError(msg)
        for key in change.add:
            root.add_key(key, role)
    for text in change.remove:
        having = {role: _found(root, role, text) for role in change.roles}
        if len(set().union(*having.values())) != 1:
            msg = (
                f"{text!r} names no one key of {', '.join(change.roles)}: `anabranch keys list` "
                "names them"
            )
            raise InvalidInputError(msg)
        for role, keys in having.items():
            for keyid in keys:
                root.revoke_key(keyid, role)
    for role in change.roles:
        threshold = change.threshold or root.roles[role].threshold
        count = len(root.roles[role].keyids)
        if not 1 <= threshold <= count:
            msg = f"{role} would have {count} keys, of which {threshold} must sign: add keys first"
            raise InvalidInputError(msg)
        root.roles[role].threshold = threshold


def _found(root: Root, role: str, text: str) -> set[str]:
    known = root.roles[role].keyids
    return {keyid for keyid in known if len(text) >= _SHORT and keyid.startswith(text)}
