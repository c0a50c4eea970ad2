"""Apply a delta: verify the base, write the target beside it, verify, and only then name it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt
import zstandard

from edge.delta.files import AtomicFile, storage_errors
from edge.delta.format import (
    MAX_REGION,
    REGION,
    Header,
    Region,
    mask_bytes,
    steps_bytes,
    take,
    take_header,
)
from edge.student.bundle import sha256_file
from protos.errors import IntegrityError, WrongBaseError

if TYPE_CHECKING:
    from io import BufferedReader
    from pathlib import Path

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def _unpack_table() -> npt.NDArray[np.uint32]:
    """A byte of four steps to four bytes to add, read as one integer."""
    adds = np.array([0, 1, 255, 0], np.uint8)  # 0 and 3 are escapes: they add elsewhere
    codes = np.arange(256, dtype=np.uint8)
    fours = np.stack([adds[codes >> shift & 3] for shift in (0, 2, 4, 6)], axis=1)
    return np.ascontiguousarray(fours).view(np.uint32).ravel()


_UNPACK = _unpack_table()


def apply(
    base: Path,
    delta: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    fsync: bool = True,
) -> None:
    """Make ``out`` from ``base`` and ``delta``; memory stays under 32 MB whatever they say.

    ``out`` appears only when its SHA-256 is the one that the delta names. Whether that is the one
    that a release names is the caller's to check (:func:`read_header`).

    Args:
        base: the file that the delta was made from.
        delta: an ANBD file.
        out: the file to make; it may exist and is then replaced.
        progress: called with bytes of the target written, and its size.
        fsync: whether ``out`` is durable on return.

    Raises:
        WrongBaseError: ``base`` is another file: fetch the full file.
        IntegrityError: the delta is malformed, truncated, or does not give what it says.
        StorageError: the disk is full or failed.
    """
    with storage_errors(f"applying {delta} to {base}"), delta.open("rb") as changes:
        header = take_header(changes)
        _check_base(base, header)
        with base.open("rb") as old, AtomicFile(out, fsync=fsync) as new:
            writer = _Writer(new, header.size, progress)
            changed = 0
            for _ in range(header.regions):
                region = Region(*REGION.unpack(take(changes, REGION.size, "a region's head")))
                region.check(start=writer.written, header=header)
                _copy(old, writer, region.offset - writer.written)
                writer.write(_changed(region, _read(old, region.length), changes))
                changed += region.changed
            if changed != header.changed_bytes or changes.read(1):
                msg = "delta: it holds more or less than its header says; fetch the delta again"
                raise IntegrityError(msg)
            _copy(old, writer, header.size - writer.written)
            if writer.sha256 != header.target_sha256:
                msg = (
                    f"delta: it gives a file with SHA-256 {writer.sha256}, not the stated "
                    f"{header.target_sha256}; fetch the delta again or the full file"
                )
                raise IntegrityError(msg)
            new.commit()


class _Writer:
    """Writes, hashes and counts."""

    def __init__(self, file: AtomicFile, size: int, progress: Progress | None) -> None:
        self._file = file
        self._size = size
        self._progress = progress
        self._hash = hashlib.sha256()
        self.written = 0

    def write(self, data: memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.written += data.nbytes
        if self._progress is not None:
            self._progress(self.written, self._size)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def _check_base(base: Path, header: Header) -> None:
    size = base.stat().st_size
    found = sha256_file(base) if size == header.size else f"a file of {size} bytes"
    if found != header.base_sha256:
        msg = (
            f"delta: made for the file {header.base_sha256} of {header.size} bytes, but "
            f"{base} is {found}; fetch the full file"
        )
        raise WrongBaseError(msg)


def _read(base: BufferedReader, size: int) -> Bytes:
    """The next bytes of the base, as an array that may be written to."""
    block = np.empty(size, np.uint8)
    if base.readinto(block.data) != size:
        msg = "delta: the base became shorter while it was read; fetch the full file"
        raise WrongBaseError(msg)
    return block


def _copy(base: BufferedReader, writer: _Writer, size: int) -> None:
    while size:
        block = _read(base, min(size, MAX_REGION))
        writer.write(block.data)
        size -= block.size


def _changed(region: Region, block: Bytes, changes: BinaryIO) -> memoryview:
    """The target's bytes of a region, from the base's ``block`` of the same place."""
    what = f"the region at {region.offset}"
    packed = _part(changes, region.mask_size, mask_bytes(region.length), what)
    steps = _part(changes, region.steps_size, steps_bytes(region.changed), what)
    escapes = _part(changes, region.escapes_size, region.escapes, what)
    mask = np.unpackbits(packed, count=region.length).view(np.bool_)
    add = _UNPACK[steps].view(np.uint8)[: region.changed]
    escaped = add == 0
    if np.count_nonzero(mask) != region.changed or np.count_nonzero(escaped) != region.escapes:
        msg = f"delta: {what} has other changes than it counts; fetch the delta again"
        raise IntegrityError(msg)
    add[escaped] = escapes
    block[mask] += add
    return block.data


def _part(changes: BinaryIO, size: int, raw_size: int, what: str) -> Bytes:
    """Read and decompress one part, which must come to exactly ``raw_size`` bytes."""
    data = take(changes, size, what)
    try:
        # The size is checked first because the decompressor takes that much memory at once.
        if zstandard.frame_content_size(data) == raw_size:
            raw = zstandard.ZstdDecompressor().decompress(
                data, max_output_size=raw_size, allow_extra_data=False
            )
            return np.frombuffer(raw, np.uint8)
    except zstandard.ZstdError as error:
        msg = f"delta: {what} does not decompress ({error}); fetch the delta again"
        raise IntegrityError(msg) from error
    msg = f"delta: {what} has a part that is not of {raw_size} bytes; fetch the delta again"
    raise IntegrityError(msg)
