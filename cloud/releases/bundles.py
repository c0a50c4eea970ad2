"""Student bundles into blobs, and out of them as folders."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from edge.delta.files import fsync_folder, storage_errors
from edge.student.bundle import FILES, BundleFile, read_harness
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

    from cloud.releases.blobs import Blobs
    from protos.v1 import release_pb2


class BundleFolders:
    """``bundles/<student>``: released bundles as folders, whole or made again."""

    def __init__(self, *, folder: Path, blobs: Blobs) -> None:
        self._folder = folder
        self._blobs = blobs

    def take_in(self, bundle: Path) -> list[BundleFile]:
        """Make blobs of a bundle's files.

        Raises:
            InvalidInputError: its harness is malformed.
            IntegrityError: a file is missing.
            StorageError: the disk is full or failed.
        """
        missing = [name for name in FILES if not (bundle / name).is_file()]
        if missing:
            msg = f"{bundle} is not a whole student bundle: {', '.join(missing)} is missing"
            raise IntegrityError(msg)
        read_harness(bundle)
        blobs = {name: self._blobs.put(bundle / name) for name in FILES}
        return [BundleFile(name, blob.sha256, blob.size) for name, blob in blobs.items()]

    def folder(self, manifest: release_pb2.Manifest) -> Path:
        """The folder of a release's student; made when it is not there whole.

        Raises:
            IntegrityError: a file was damaged.
            StorageError: the disk is full or failed.
        """
        folder = self._folder / manifest.student
        with storage_errors(f"making the bundle folder {folder}"):
            if _is_whole(folder, manifest):
                return folder
            making = folder.with_name(f"{manifest.student}.tmp")
            for left in (making, folder):
                if left.exists():
                    shutil.rmtree(left)
            making.mkdir(parents=True)
            for file in manifest.files:
                self._blobs.copy_out(file.sha256, making / file.name)
            making.rename(folder)
            fsync_folder(self._folder)
        return folder


def _is_whole(folder: Path, manifest: release_pb2.Manifest) -> bool:
    return all(
        (path := folder / f.name).is_file() and path.stat().st_size == f.size
        for f in manifest.files
    )
