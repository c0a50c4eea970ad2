"""The delta format "ANBD", version 2.

All integers are little-endian. A delta is one header, a table of tensors, and operations::

    header     magic "ANBD" | version u16 | zero u16 | base SHA-256 | target SHA-256
               | base size u64 | target size u64 | tensors u32 | zero u32
    tensor     offset u64 | rows u32 | columns u32 | offset of its scales u64 | block u32
    operation  kind u32 | length u32 | base offset u64 | payload u32 | zero u32 | payload

Operations give the target from its first byte to its last, ``length`` bytes each:

=========  ======================================================================================
COPY       bytes of the base; no payload
CODES      bytes of the base of which some change; at most :data:`MAX_REGION`
FRESH      new bytes: the payload is a zstd frame of them; at most :data:`MAX_REGION`
FACTORS    no bytes: from here on, some rows of tensors of the base are read with low-rank products
           added (``edge/delta/product.py``); those of an earlier FACTORS no more
=========  ======================================================================================

The payloads are in ``edge/delta/payload.py``.

A tensor is a matrix of codes, one byte each, with an fp32 scale for each ``block`` codes of a row.
Tensors come in the order of their offsets and do not overlap.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, BinaryIO, Self

from edge.delta.files import storage_errors
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"ANBD"
VERSION = 2
MAX_REGION = 2 << 20
"""Bytes of one region: what bounds the memory of both ends."""
MAX_PAYLOAD = 5 << 20
"""Bytes of what an operation carries: factors that do not compress at all, and their heads."""
MAX_TENSORS = 1 << 13
MAX_SIZE = 1 << 62

HEADER = struct.Struct("<4sHH32s32sQQII")
TENSOR = struct.Struct("<QIIQI")
OPERATION = struct.Struct("<IIQII")


class Kind(IntEnum):
    """What an operation does."""

    COPY = 1
    CODES = 2
    FRESH = 3
    FACTORS = 4


@dataclass(frozen=True)
class Tensor:
    """A matrix of codes in the base, with one fp32 scale for each ``block`` codes of a row.

    ``offset`` is where its codes begin, ``scales`` where its scales do, bytes.
    """

    offset: int
    rows: int
    columns: int
    scales: int
    block: int

    @property
    def size(self) -> int:
        """Bytes of its codes."""
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        """Where its codes end."""
        return self.offset + self.size

    @property
    def scales_stop(self) -> int:
        """Where its scales end."""
        return self.scales + self.size // self.block * 4

    def fits(self, base_size: int) -> bool:
        """Whether codes and scales lie in a base of that size."""
        whole = self.rows > 0 < self.block <= self.columns and self.columns % self.block == 0
        return whole and max(self.stop, self.scales_stop) <= base_size


@dataclass(frozen=True)
class Header:
    """What a delta says of itself; digests are lower-case hex, sizes in bytes."""

    base_sha256: str
    target_sha256: str
    base_size: int
    target_size: int
    tensors: int

    def pack(self) -> bytes:
        """The header's bytes."""
        digests = bytes.fromhex(self.base_sha256), bytes.fromhex(self.target_sha256)
        return HEADER.pack(MAGIC, VERSION, 0, *digests, *astuple(self)[2:], 0)


@dataclass(frozen=True)
class Operation:
    """The head of an operation; ``payload`` are the bytes that follow it."""

    kind: Kind
    length: int
    base: int
    payload: int

    def pack(self) -> bytes:
        """The head's bytes."""
        return OPERATION.pack(self.kind, self.length, self.base, self.payload, 0)

    @classmethod
    def take(cls, file: BinaryIO, *, made: int, header: Header) -> Self:
        """Read a head and check every number against its bounds, before any memory is taken.

        Args:
            file: a delta.
            made: how much of the target the operations before gave.
            header: the delta's.

        Raises:
            IntegrityError: a number is out of bounds, or the file ends.
        """
        kind, length, base, payload, zero = OPERATION.unpack(
            take(file, OPERATION.size, "an operation's head")
        )
        from_base = base + length <= header.base_size and payload <= MAX_PAYLOAD
        bounded = 0 < length <= MAX_REGION and made + length <= header.target_size
        right = zero == 0 and (
            (kind == Kind.COPY and from_base and payload == 0 < length <= header.target_size - made)
            or (kind == Kind.CODES and from_base and bounded)
            or (kind == Kind.FRESH and bounded and base == 0 and payload <= MAX_PAYLOAD)
            or (kind == Kind.FACTORS and base == length == 0 and payload <= MAX_PAYLOAD)
        )
        if not right:
            msg = (
                f"delta: an operation's numbers are out of bounds: kind {kind}, {length} bytes at "
                f"{base} with {payload} bytes; fetch the delta again"
            )
            raise IntegrityError(msg)
        return cls(Kind(kind), length, base, payload)


def take(file: BinaryIO, size: int, what: str) -> bytes:
    """Read exactly ``size`` bytes.

    Raises:
        IntegrityError: the file ends before.
    """
    data = file.read(size)
    if len(data) != size:
        msg = f"delta: it ends within {what} at byte {file.tell()}; fetch the delta again"
        raise IntegrityError(msg)
    return data


def take_header(file: BinaryIO) -> Header:
    """Read and check the header at the start of ``file``."""
    magic, version, zero, base, target, *numbers, last = HEADER.unpack(
        take(file, HEADER.size, "its header")
    )
    if magic != MAGIC or zero != 0 or (version == VERSION and last != 0):
        msg = "delta: this is no ANBD file; fetch the delta again"
        raise IntegrityError(msg)
    if version != VERSION:
        msg = (
            f"delta: format version {version} is unknown here (known: {VERSION}); "
            "update this program or fetch the full file"
        )
        raise IntegrityError(msg)
    header = Header(base.hex(), target.hex(), *numbers)
    if header.tensors > MAX_TENSORS or max(header.base_size, header.target_size) > MAX_SIZE:
        msg = f"delta: its header is out of bounds: {header}; fetch the delta again"
        raise IntegrityError(msg)
    return header


def take_tensors(file: BinaryIO, header: Header) -> list[Tensor]:
    """Read and check the table of tensors, which follows the header."""
    raw = take(file, header.tensors * TENSOR.size, "its table of tensors")
    tensors = [Tensor(*numbers) for numbers in TENSOR.iter_unpack(raw)]
    stops = [0, *(t.stop for t in tensors)]
    for tensor, before in zip(tensors, stops, strict=False):
        if tensor.offset < before or not tensor.fits(header.base_size):
            msg = f"delta: {tensor} is out of bounds; fetch the delta again"
            raise IntegrityError(msg)
    return tensors


def read_header(path: Path) -> Header:
    """The header of the delta at ``path``.

    Raises:
        IntegrityError: it is malformed or truncated.
        StorageError: it cannot be read.
    """
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        return take_header(file)
