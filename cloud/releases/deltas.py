"""Deltas between weights files, built when asked for and kept."""

from __future__ import annotations

import json
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import zstandard

from cloud.db import read, write
from cloud.releases.tables import DeltaRow
from edge import delta
from edge.delta.files import storage_errors
from edge.student.bundle import WEIGHTS
from protos.errors import IntegrityError
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from sqlalchemy import Engine

    from cloud.releases.blobs import Blobs
    from edge.student.bundle import BundleFile

_BLOCK = 1 << 20
_LAYOUT = "student.json"
_UNKNOWN: Mapping[str, Any] = MappingProxyType({})


class DeltaStore:
    """Builds and keeps deltas between blobs."""

    def __init__(self, *, blobs: Blobs, engine: Engine) -> None:
        self._blobs = blobs
        self._engine = engine

    def between(
        self,
        base_sha256: str,
        target_sha256: str,
        *,
        base_layout: Mapping[str, Any] = _UNKNOWN,
        target_layout: Mapping[str, Any] = _UNKNOWN,
        updates: Sequence[delta.Update] = (),
    ) -> release_pb2.Delta | None:
        """The delta that turns one weights file into another, from the cache or built now.

        Args:
            base_sha256: the file that a device has.
            target_sha256: the file that it should have.
            base_layout: the base's ``student.json``, if it is known: it makes the delta smaller.
            target_layout: the target's: tensors at other places are found.
            updates: products that turned the base's codes into the target's.

        Returns:
            None when the delta is no smaller than the compressed target.

        Raises:
            IntegrityError: a blob is missing or was damaged.
            StorageError: the disk is full or failed.
        """
        known = self._cached(base_sha256, target_sha256)
        if known is None:
            tensors = delta.tensors_in(base_layout)
            encode = partial(
                delta.encode,
                tensors=tensors,
                updates=[u for u in updates if u.tensor in tensors],
                stretches=delta.stretches_between(base_layout, target_layout),
            )
            known = self._build(base_sha256, target_sha256, encode)
        sha256, size = known
        if not sha256:
            return None
        return release_pb2.Delta(
            base_sha256=base_sha256, target_sha256=target_sha256, sha256=sha256, size=size
        )

    def between_bundles(
        self,
        old: Iterable[release_pb2.File],
        new: Iterable[BundleFile],
        updates: Sequence[delta.Update] = (),
    ) -> list[release_pb2.Delta]:
        """The delta between the weights of two bundles, where there is one; see :meth:`between`."""
        before = {f.name: f.sha256 for f in old}
        after = {f.name: f.sha256 for f in new}
        if before[WEIGHTS] == after[WEIGHTS]:
            return []
        found = self.between(
            before[WEIGHTS],
            after[WEIGHTS],
            base_layout=self._layout(before[_LAYOUT]),
            target_layout=self._layout(after[_LAYOUT]),
            updates=updates,
        )
        return [] if found is None else [found]

    def _layout(self, sha256: str) -> Mapping[str, Any]:
        """What a ``student.json`` says; nothing if it is none that this program understands."""
        try:
            layout = json.loads(self._blobs.path(sha256).read_bytes())
        except (OSError, ValueError):
            return _UNKNOWN
        return layout if isinstance(layout, dict) else _UNKNOWN

    def _cached(self, base_sha256: str, target_sha256: str) -> tuple[str, int] | None:
        with read(self._engine) as session:
            row = session.get(DeltaRow, (base_sha256, target_sha256))
            known = None if row is None else (row.sha256, row.size)
        if known is not None and known[0]:
            try:
                self._blobs.check(known[0])
                delta.read_header(self._blobs.path(known[0]))
            except IntegrityError:
                return None  # damaged, gone, or of an earlier format: it is built again
        return known

    def _build(
        self,
        base_sha256: str,
        target_sha256: str,
        encode: Callable[[Path, Path, Path], delta.DeltaInfo],
    ) -> tuple[str, int]:
        base, target = self._blobs.path(base_sha256), self._blobs.path(target_sha256)
        made = self._blobs.temporary()
        self._blobs.check(base_sha256)
        self._blobs.check(target_sha256)
        try:
            size = encode(base, target, made).size
            pays = _compressed_exceeds(target, size)
            sha256 = self._blobs.put(made).sha256 if pays else ""
        finally:
            made.unlink(missing_ok=True)
        with write(self._engine) as session:
            session.merge(
                DeltaRow(
                    base_sha256=base_sha256, target_sha256=target_sha256, sha256=sha256, size=size
                )
            )
        return sha256, size


def _compressed_exceeds(path: Path, size: int) -> bool:
    """Whether the compressed file is bigger than ``size`` bytes; reads no more than it takes."""
    compressor = zstandard.ZstdCompressor().compressobj()
    compressed = 0
    with storage_errors(f"compressing {path}"), path.open("rb") as file:
        while block := file.read(_BLOCK):
            compressed += len(compressor.compress(block))
            if compressed > size:
                return True
    return compressed + len(compressor.flush()) > size
