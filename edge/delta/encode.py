"""Make a delta: two files in, their difference out, in one pass and bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import zstandard

from edge.delta.files import AtomicFile, storage_errors
from edge.delta.format import HEADER, MAX_REGION, Header, Region
from edge.student.bundle import sha256_file
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_STEPS = np.zeros(256, np.uint8)
_STEPS[1] = 1
_STEPS[255] = 2

# Places and steps look random: zstd finds short matches in them that cost more than the literals
# they replace. With few and long matches only its Huffman coder is left. Level 3 is for patterns.
_LITERAL = zstandard.ZstdCompressionParameters.from_level(
    1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, target_length=0
)


@dataclass(frozen=True)
class DeltaInfo:
    """What was encoded; digests are lower-case hex, ``size`` is the delta's own, in bytes."""

    base_sha256: str
    target_sha256: str
    sha256: str
    size: int
    changed_bytes: int


def encode(base: Path, target: Path, out: Path, *, progress: Progress | None = None) -> DeltaInfo:
    """Write to ``out`` the delta that turns ``base`` into ``target``.

    Args:
        base: the file that a device has.
        target: the file that it should have, of the same size.
        out: where the delta goes; it appears whole or not at all.
        progress: called with bytes of the target read, and its size.

    Raises:
        InvalidInputError: the files differ in size, so that their layouts do: there is no delta.
        StorageError: a file cannot be read or written.
    """
    base_hash, target_hash = hashlib.sha256(), hashlib.sha256()
    with storage_errors(f"encoding {out} from {base} and {target}"):
        size = _common_size(base, target)
        regions = changed = start = 0
        with base.open("rb") as old, target.open("rb") as new, AtomicFile(out) as file:
            file.write(bytes(HEADER.size))
            while block := new.read(MAX_REGION):
                was = old.read(MAX_REGION)
                base_hash.update(was)
                target_hash.update(block)
                if was != block:
                    head, payload = _region(start, was, block)
                    file.write(head.pack())
                    file.write(payload)
                    regions += 1
                    changed += head.changed
                start += len(block)
                if progress is not None:
                    progress(start, size)
            header = Header(base_hash.hexdigest(), target_hash.hexdigest(), size, regions, changed)
            file.write_at(header.pack(), 0)
            file.commit()
        return DeltaInfo(
            header.base_sha256, header.target_sha256, sha256_file(out), out.stat().st_size, changed
        )


def _common_size(base: Path, target: Path) -> int:
    sizes = base.stat().st_size, target.stat().st_size
    if sizes[0] != sizes[1]:
        msg = (
            f"no delta from {base} ({sizes[0]} bytes) to {target} ({sizes[1]} bytes): their "
            "layouts differ; ship the full file"
        )
        raise InvalidInputError(msg)
    return sizes[0]


def _region(start: int, was: bytes, block: bytes) -> tuple[Region, bytes]:
    """One region: the part of ``block`` from its first to its last change."""
    difference: Bytes = np.frombuffer(block, np.uint8) - np.frombuffer(was, np.uint8)
    places = np.flatnonzero(difference)
    first, last = int(places[0]), int(places[-1]) + 1
    values = difference[places]
    steps = _STEPS[values]
    escapes = values[steps == 0]
    mask = np.packbits(difference[first:last] != 0)
    parts = [_compress(part) for part in (mask, _pack_steps(steps), escapes)]
    head = Region(start + first, last - first, values.size, escapes.size, *map(len, parts))
    return head, b"".join(parts)


def _pack_steps(steps: Bytes) -> Bytes:
    """Four steps a byte, low bits first; the last byte is filled with zeros."""
    padded = np.zeros((steps.size + 3) // 4 * 4, np.uint8)
    padded[: steps.size] = steps
    fours = padded.reshape(-1, 4)
    packed = fours[:, 0] | fours[:, 1] << 2 | fours[:, 2] << 4 | fours[:, 3] << 6
    return packed.astype(np.uint8)


def _compress(data: Bytes) -> bytes:
    raw = data.tobytes()
    literal = zstandard.ZstdCompressor(compression_params=_LITERAL).compress(raw)
    matched = zstandard.ZstdCompressor(level=3).compress(raw)
    return min(literal, matched, key=len)
