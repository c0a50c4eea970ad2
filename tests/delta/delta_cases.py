"""Files and deltas that tests of the codec share, and a corpus of altered deltas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge import delta
from edge.delta.format import HEADER, OPERATION, TENSOR, Operation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

ROWS, COLUMNS = 96, 64
SCALES = ROWS * COLUMNS
"""Where the scales of the one tensor begin: behind its codes."""
BLOCK = 32
TENSOR_AT_0 = delta.Tensor(0, ROWS, COLUMNS, SCALES, BLOCK)
SIZE = SCALES + ROWS * COLUMNS // BLOCK * 4 + 500


def codes(seed: int, size: int) -> Bytes:
    return np.random.default_rng(seed).normal(128, 30, size).clip(1, 255).astype(np.uint8)


def nudged(base: Bytes, seed: int, share: float) -> Bytes:
    """As training moves codes: a share of them by one step, a few by more."""
    rng = np.random.default_rng(seed)
    target = base.copy()
    moved = rng.random(base.size) < share
    target[moved] += rng.choice(
        np.array([1, 255, 2, 17], np.uint8), moved.sum(), p=[0.48, 0.48, 0.03, 0.01]
    )
    return target


def weights(seed: int) -> Bytes:
    """A file of one tensor of codes, its scales, and some more bytes."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.002, 0.02, ROWS * COLUMNS // BLOCK).astype("<f4")
    return np.concatenate([codes(seed, SCALES), scales.view(np.uint8), codes(seed + 1, 500)])


def factors(seed: int, rows: int = ROWS, rank: int = 5) -> delta.Factors:
    rng = np.random.default_rng(seed)
    left, right = (rng.normal(0, 25, (n, rank)).clip(-127, 127) for n in (rows, COLUMNS))
    width = np.linspace(4e-6, 1e-6, rank)
    phase = int(rng.integers(1 << 16))
    return delta.Factors.of(left.astype(np.int8), right.astype(np.int8), width, 0.002, phase)


def added(base: Bytes, update: delta.Update) -> Bytes:
    """The base with an update added, by a computation in plain Python integers."""
    target, some = base.copy(), update.factors
    for i in range(len(some.left)):
        for j in range(COLUMNS):
            total = sum(
                int(a) * int(w) * int(b)
                for a, w, b in zip(some.left[i], some.weights, some.right[j], strict=True)
            )
            row = update.first + i
            at = SCALES + (row * COLUMNS + j) // BLOCK * 4
            bits = int.from_bytes(base[at : at + 4].tobytes(), "little")
            shift = some.power - (bits >> 23) + 150
            rate = min((1 << max(shift, 0)) // (bits & (1 << 23) - 1 | 1 << 23), (1 << 24) - 1)
            dither = (49472 * i + 37345 * j + some.phase) % (1 << 16) << some.fraction - 16
            step = (total * rate + dither) >> some.fraction
            place = row * COLUMNS + j
            target[place] = min(max(int(base[place]) + step, 1), 255)
    return target


@dataclass(frozen=True)
class Case:
    """Three files: a base, its target, and the delta between them."""

    base: Path
    target: Path
    made: Path

    @classmethod
    def of(cls, folder: Path, base: Bytes, target: Bytes, **options: object) -> Case:
        case = cls(*(folder / name for name in ("base", "target", "delta")))
        base.tofile(case.base)
        target.tofile(case.target)
        delta.encode(case.base, case.target, case.made, **options)  # type: ignore[arg-type]
        return case


def full(folder: Path) -> Case:
    """A delta with every kind of operation, of files of two sizes."""
    base = weights(0)
    updates = [
        delta.Update(TENSOR_AT_0, first, factors(first, rows)) for first, rows in ((3, 40), (60, 9))
    ]
    target = base
    for update in updates:
        target = added(target, update)
    target = target.copy()
    target[:SCALES] = nudged(target[:SCALES], 5, 0.02)
    target = np.concatenate([target[:-300], codes(9, 700), target[-300:]])
    stretches = [
        delta.Stretch(0, 0, SIZE - 300),
        delta.Stretch(SIZE + 400, SIZE - 300, 300),
    ]
    return Case.of(
        folder, base, target, tensors=[TENSOR_AT_0], updates=updates, stretches=stretches
    )


def boundaries(data: bytes) -> Iterator[int]:
    """Where each part of a delta ends: header, tensors, heads, payloads."""
    yield HEADER.size
    at = HEADER.size + TENSOR.size * int.from_bytes(data[88:92], "little")
    yield at
    while at < len(data):
        _, _, _, payload, _ = OPERATION.unpack_from(data, at)
        yield at + OPERATION.size
        at += OPERATION.size + payload
        yield at


def operations(data: bytes) -> list[tuple[int, Operation]]:
    """The operations of a delta and where their heads are."""
    found = []
    at = HEADER.size + TENSOR.size * int.from_bytes(data[88:92], "little")
    while at < len(data):
        kind, length, base, payload, _ = OPERATION.unpack_from(data, at)
        found.append((at, Operation(kind, length, base, payload)))
        at += OPERATION.size + payload
    return found


def corpus(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Altered deltas: bits, bytes, numbers, and whole stretches, most where structure is."""
    rng = np.random.default_rng(seed)
    edges = np.array([0, *boundaries(data)])
    numbers = (0, 1, 2**16, 2**31, 2**32 - 1)
    for n in range(count):
        altered = bytearray(data)
        near = int(np.clip(rng.choice(edges) + rng.integers(-40, 40), 0, len(data) - 1))
        place = near if n % 3 else int(rng.integers(len(data)))
        kind = n % 7
        if kind == 0:
            altered[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            altered[place] = int(rng.integers(256))
        elif kind == 2:
            del altered[place:]
        elif kind == 3:
            altered[place : place + 4] = int(rng.choice(numbers)).to_bytes(4, "little")
        elif kind == 4:
            del altered[place : place + int(rng.integers(1, 64))]
        elif kind == 5:
            altered[place:place] = rng.bytes(int(rng.integers(1, 64)))
        else:
            start = int(rng.integers(len(data)))
            altered[place : place + 32] = data[start : start + 32]
        if altered != data:
            yield bytes(altered)
