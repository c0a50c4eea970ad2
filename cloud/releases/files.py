"""Files of signed metadata, by the names that TUF gives them."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from cloud.releases.metadata import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, load, verified
from edge.delta.files import storage_errors, write_atomic
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)

_NAME = re.compile(r"(timestamp|[1-9][0-9]{0,15}\.(root|targets|snapshot))\.json")
_KEPT = 4  # versions of targets and snapshot: a device may be reading the ones before
_HASHES = ["sha256"]


def open_files(state: Path) -> MetadataFiles:
    """The files of a cloud's state folder, for who looks at them beside it.

    Raises:
        InvalidInputError: there is no repository.
    """
    folder = state / "tuf" / "metadata"
    if not folder.is_dir():
        msg = f"{state} has no TUF repository yet: start `anabranch cloud` with it once"
        raise InvalidInputError(msg)
    return MetadataFiles(folder)


class MetadataFiles:
    """The folder that devices read from."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with storage_errors(f"creating {folder}"):
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> bytes | None:
        """A file by the name that TUF gives it; None if there is none.

        Raises:
            StorageError: the disk failed.
        """
        path = self._folder / name
        with storage_errors(f"reading {path}"):
            return path.read_bytes() if _NAME.fullmatch(name) and path.exists() else None

    def write(self, metadata: Metadata[Any]) -> None:
        """Publish metadata; of targets and snapshots the latest few are kept, of roots all.

        Raises:
            StorageError: the disk is full or failed; what was published before is still there.
        """
        role, version = metadata.signed.type, metadata.signed.version
        write_atomic(self._folder / _name(role, version), metadata.to_bytes())
        if role in (TARGETS, SNAPSHOT):
            with storage_errors(f"deleting old metadata in {self._folder}"):
                for old in self.versions(role)[_KEPT:]:
                    (self._folder / _name(role, old)).unlink(missing_ok=True)

    def versions(self, role: str) -> list[int]:
        """Versions that there are of a role, the newest first."""
        names = (path.name.partition(".")[0] for path in self._folder.glob(f"*.{role}.json"))
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def metafile(self, metadata: Metadata[Any]) -> MetaFile:
        """Version, length and hash of a file, as snapshot and timestamp hold it."""
        path = self._folder / _name(metadata.signed.type, metadata.signed.version)
        with storage_errors(f"reading {path}"):
            return MetaFile.from_data(metadata.signed.version, path.read_bytes(), _HASHES)

    def root(self) -> Metadata[Root]:
        """The newest root.

        Raises:
            IntegrityError: it is damaged.
            StorageError: the disk failed.
        """
        return load(self._folder / _name(ROOT, self.versions(ROOT)[0]), Root)

    def targets(self, root: Root) -> Metadata[Targets]:
        """The newest that the root's keys signed; one that a crash left too early is passed by.

        Raises:
            IntegrityError: there is none.
            StorageError: the disk failed.
        """
        for version in self.versions(TARGETS):
            try:
                targets = load(self._folder / _name(TARGETS, version), Targets)
            except IntegrityError as error:
                _log.error("%s; an older one is used", error)  # for people
                continue
            if verified(root, TARGETS, targets):
                return targets
        msg = (
            f"{self._folder} has no targets.json that the keys of the newest root signed: restore "
            "the state folder from one backup"
        )
        raise IntegrityError(msg)

    def snapshot(self) -> Metadata[Snapshot] | None:
        """The newest snapshot, if it can be read: it can be signed anew at any time."""
        versions = self.versions(SNAPSHOT)
        return self._online(_name(SNAPSHOT, versions[0]), Snapshot) if versions else None

    def timestamp(self) -> Metadata[Timestamp] | None:
        """The timestamp, if it can be read: it can be signed anew at any time."""
        return self._online(_name(TIMESTAMP, 0), Timestamp)

    def _online(self, name: str, kind: type[Any]) -> Metadata[Any] | None:
        path = self._folder / name
        if not path.exists():
            return None
        try:
            return load(path, kind)
        except IntegrityError as error:
            _log.warning("%s is made anew: %s", path, error)
            return None


def _name(role: str, version: int) -> str:
    return "timestamp.json" if role == TIMESTAMP else f"{version}.{role}.json"
