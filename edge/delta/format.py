"""The delta format "ANBD", version 1.

All integers are little-endian. A delta is one header and then its regions::

    header   magic "ANBD" | version u16 | zero u16 | base SHA-256 | target SHA-256
             | size u64 | regions u32 | changed bytes u64
    region   offset u64 | length u32 | changed u32 | escapes u32
             | size of the mask u32 | of the steps u32 | of the escapes u32
             | mask | steps | escapes

Base and target have one size; the target is the base with bytes of the regions changed. A region
is at most :data:`MAX_REGION` bytes, regions come in order and do not overlap, and what lies between
them costs nothing. Its three parts are zstd frames of known size:

* the mask: one bit for each byte of the region, most significant bit first: is it changed?
* the steps: two bits for each changed byte, low bits first: 1 is +1, 2 is -1, 0 is an escape;
* the escapes: target minus base modulo 256 of the changed bytes that did neither.

Almost all changed codes of a quantized tensor move by one step at places that look random. On 53
million codes of which 15% moved, places and steps apart came to 5.3 MB where the entropy is 5.2 MB;
two bits for every place 5.5 MB; zstd of the plain differences 9.5 MB.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from edge.delta.files import storage_errors
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"ANBD"
VERSION = 1
MAX_REGION = 4 << 20
"""Bytes of one region: what bounds the memory of both ends (about six times this)."""

HEADER = struct.Struct("<4sHH32s32sQIQ")
REGION = struct.Struct("<QIIIIII")


@dataclass(frozen=True)
class Header:
    """What a delta says of itself; digests are lower-case hex, ``size`` is of either, bytes."""

    base_sha256: str
    target_sha256: str
    size: int
    regions: int
    changed_bytes: int

    def pack(self) -> bytes:
        """The header's bytes."""
        return HEADER.pack(
            MAGIC,
            VERSION,
            0,
            bytes.fromhex(self.base_sha256),
            bytes.fromhex(self.target_sha256),
            self.size,
            self.regions,
            self.changed_bytes,
        )


@dataclass(frozen=True)
class Region:
    """The head of one region; the last three fields are sizes of compressed parts, in bytes."""

    offset: int
    length: int
    changed: int
    escapes: int
    mask_size: int
    steps_size: int
    escapes_size: int

    def pack(self) -> bytes:
        """The head's bytes."""
        return REGION.pack(
            self.offset,
            self.length,
            self.changed,
            self.escapes,
            self.mask_size,
            self.steps_size,
            self.escapes_size,
        )

    def check(self, *, start: int, header: Header) -> None:
        """Check every number against the format's bounds, before any memory is taken.

        Args:
            start: where the region before this one ended.
            header: the header of the delta.

        Raises:
            IntegrityError: a number is out of bounds.
        """
        right = (
            start <= self.offset
            and 0 < self.length <= MAX_REGION
            and self.offset + self.length <= header.size
            and 0 < self.changed <= self.length
            and self.escapes <= self.changed
            and self.mask_size <= _bound(mask_bytes(self.length))
            and self.steps_size <= _bound(steps_bytes(self.changed))
            and self.escapes_size <= _bound(self.escapes)
        )
        if not right:
            msg = f"delta: a region's numbers are out of bounds: {self}; fetch the delta again"
            raise IntegrityError(msg)


def mask_bytes(length: int) -> int:
    """Bytes of the unpacked mask of a region of ``length`` bytes."""
    return (length + 7) // 8


def steps_bytes(changed: int) -> int:
    """Bytes of the unpacked steps of ``changed`` bytes."""
    return (changed + 3) // 4


def _bound(raw: int) -> int:
    """The most bytes that zstd makes of ``raw`` bytes."""
    return raw + (raw >> 7) + 128


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
    magic, version, zero, base, target, size, regions, changed = HEADER.unpack(
        take(file, HEADER.size, "its header")
    )
    if magic != MAGIC or zero != 0:
        msg = "delta: this is no ANBD file; fetch the delta again"
        raise IntegrityError(msg)
    if version != VERSION:
        msg = (
            f"delta: format version {version} is unknown here (known: {VERSION}); "
            "update this program or fetch the full file"
        )
        raise IntegrityError(msg)
    if not regions <= changed <= size:
        msg = f"delta: {regions} regions cannot change {changed} of {size} bytes"
        raise IntegrityError(msg)
    return Header(base.hex(), target.hex(), size, regions, changed)


def read_header(path: Path) -> Header:
    """The header of the delta at ``path``.

    Raises:
        IntegrityError: it is malformed or truncated.
        StorageError: it cannot be read.
    """
    with storage_errors(f"reading {path}"), path.open("rb") as file:
        return take_header(file)
