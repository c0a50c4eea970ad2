"""What operations carry, packed by the coder of ``edge/delta/rans.py``.

CODES::

    size of the steps u32 | escapes u32 | lowest scale u32 | steps | escapes

A byte of the steps is four bytes of the region, two bits each, low bits first: 0 unchanged, 1 is
+1, 2 is -1 (modulo 256), 3 an escape, of which the second sequence has the difference. The last
byte is filled with zeros. Its context says how large the scale of the first of its bytes is
(``Base.contexts`` in ``edge/delta/base.py``).

FACTORS::

    sets u32 | set ... | numbers
    set: base offset u64 | tensor u32 | rows u32 | rank u16 | power i16 | fraction u8 | zero u8
         | phase u16 | w u16 [rank] | contexts u8 [2, rank]

The numbers are one sequence, for each set left [rank, rows] and then right [rank, columns]; a
column of a factor has one context. Sets are in the order of their base offsets.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt
import zstandard

from edge.delta import rans
from edge.delta.product import MAX_NUMBERS, Factors
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.delta.format import Tensor

Bytes = npt.NDArray[np.uint8]
Contexts = npt.NDArray[np.uint8]

_CODES = struct.Struct("<III")
_SETS = struct.Struct("<I")
_SET = struct.Struct("<QIIHhBBH")
_ESCAPE = 3
_CONTEXTS = 16


def _unpack_table() -> npt.NDArray[np.uint32]:
    """A byte of four steps to four bytes to add, read as one integer; an escape adds its mark."""
    adds = np.array([0, 1, 255, _ESCAPE], np.uint8)
    codes = np.arange(256, dtype=np.uint8)
    fours = np.stack([adds[codes >> shift & 3] for shift in (0, 2, 4, 6)], axis=1)
    return np.ascontiguousarray(fours).view(np.uint32).ravel()


_UNPACK = _unpack_table()
_STEPS = np.full(256, _ESCAPE, np.uint8)
_STEPS[[0, 1, 255]] = 0, 1, 2


def pack_codes(difference: Bytes, contexts: Contexts, lowest: int) -> bytes:
    """The payload of a region: target minus base, modulo 256, and the contexts of its fours."""
    steps = np.zeros((difference.size + 3) // 4 * 4, np.uint8)
    steps[: difference.size] = _STEPS[difference]
    escapes = difference[steps[: difference.size] == _ESCAPE]
    fours = steps.reshape(-1, 4) << np.array([0, 2, 4, 6], np.uint8)
    packed = rans.pack(np.bitwise_or.reduce(fours, axis=1), contexts)
    head = _CODES.pack(len(packed), escapes.size, lowest)
    return head + packed + (rans.pack(escapes) if escapes.size else b"")


def lowest_of(payload: bytes) -> int:
    """The lowest scale of a region's payload, which its contexts depend on."""
    return int(_take(_CODES, payload)[2])


def unpack_codes(payload: bytes, length: int, contexts: Contexts) -> Bytes:
    """The differences of a region of ``length`` bytes.

    Raises:
        IntegrityError: the payload is not of such a region.
    """
    size, count, _ = _take(_CODES, payload)
    rest = payload[_CODES.size :]
    if not (size <= len(rest) and count <= length and (count or size == len(rest))):
        _refuse("a region has parts of other sizes")
    steps = rans.unpack(rest[:size], (length + 3) // 4, contexts)
    difference = _UNPACK[steps].view(np.uint8)
    filled, difference = difference[length:].any(), difference[:length]
    escaped = difference == _ESCAPE
    if filled or np.count_nonzero(escaped) != count:
        _refuse("a region has other escapes than it counts")
    if count:
        difference[escaped] = rans.unpack(rest[size:], count)
    return difference


@dataclass(frozen=True, eq=False)
class Update:
    """Factors to be added to rows of a tensor of the base, from row ``first`` on."""

    tensor: Tensor
    first: int
    factors: Factors

    @property
    def start(self) -> int:
        """Where its codes begin in the base."""
        return self.tensor.offset + self.first * self.tensor.columns

    @property
    def stop(self) -> int:
        """Where its codes end in the base."""
        return self.start + len(self.factors.left) * self.tensor.columns


def pack_factors(updates: Sequence[Update], tensors: Sequence[Tensor]) -> bytes:
    """The payload of updates of some of ``tensors``."""
    factors = [u.factors for u in updates]
    classes = [np.concatenate([_classes(f.left), _classes(f.right)]) for f in factors]
    _, order = np.unique(np.concatenate(classes), return_inverse=True)
    dense = order.astype(np.uint8)
    parts = [_SETS.pack(len(updates))]
    spread, start = [], 0
    for update in updates:
        some = update.factors
        rank = some.weights.size
        parts += [
            _SET.pack(
                update.start,
                tensors.index(update.tensor),
                len(some.left),
                rank,
                some.power,
                some.fraction,
                0,
                some.phase,
            ),
            some.weights.astype("<u2").tobytes(),
            dense[start : start + 2 * rank].tobytes(),
        ]
        spread.append(_spread(dense[start : start + 2 * rank], some.shape))
        start += 2 * rank
    numbers = np.concatenate([x.T.ravel() for f in factors for x in (f.left, f.right)])
    parts.append(rans.pack(numbers.view(np.uint8), np.concatenate(spread)))
    return b"".join(parts)


def unpack_factors(payload: bytes, tensors: Sequence[Tensor]) -> list[Update]:
    """The updates of a payload, of some of ``tensors``.

    Raises:
        IntegrityError: the payload is not of updates of these tensors.
    """
    (count,) = _take(_SETS, payload)
    at, room, stop = _SETS.size, MAX_NUMBERS, 0
    heads, spread = [], []
    for _ in range(count):
        start, index, rows, rank, power, fraction, zero, phase = _take(
            _SET, payload[at : at + _SET.size]
        )
        at += _SET.size
        if index >= len(tensors) or zero or at + 4 * rank > len(payload):
            _refuse("factors are of no tensor")
        tensor = tensors[index]
        first, rest = divmod(start - tensor.offset, tensor.columns)
        room -= (rows + tensor.columns) * rank
        if (
            rest
            or not max(0, stop) <= start
            or not 0 <= first < first + rows <= tensor.rows
            or room < 0
        ):
            _refuse("factors are out of bounds")
        stop = start + rows * tensor.columns
        weights = np.frombuffer(payload, "<u2", rank, at).astype(np.uint16)
        classes = np.frombuffer(payload, np.uint8, 2 * rank, at + 2 * rank)
        at += 4 * rank
        heads.append((tensor, first, rows, weights, (power, fraction, phase)))
        spread.append(_spread(classes, (rows, tensor.columns)))
    contexts = np.concatenate([np.empty(0, np.uint8), *spread])
    numbers = rans.unpack(payload[at:], contexts.size, contexts).view(np.int8)
    updates = []
    at = 0
    for tensor, first, rows, weights, more in heads:
        rank = weights.size
        middle, end = at + rows * rank, at + (rows + tensor.columns) * rank
        left = numbers[at:middle].reshape(rank, rows).T
        right = numbers[middle:end].reshape(rank, tensor.columns).T
        updates.append(Update(tensor, first, Factors(left, right, weights, *more)))
        at = end
    return updates


def _spread(classes: Contexts, shape: tuple[int, int]) -> Contexts:
    """A context for each number of both factors, from one for each of their columns."""
    return np.repeat(classes, np.repeat(shape, classes.size // 2))


def _classes(factor: npt.NDArray[np.int8]) -> Contexts:
    """How large the numbers of each column are, in half octaves."""
    power = np.square(factor.astype(np.float64)).mean(axis=0)
    octaves = np.rint(np.log2(power + 1 / 64)) + 6
    classes: Contexts = np.clip(octaves, 0, 2 * _CONTEXTS).astype(np.uint8)
    return classes


def pack_fresh(data: bytes) -> bytes:
    """The payload of new bytes."""
    return zstandard.ZstdCompressor(level=9).compress(data)


def unpack_fresh(payload: bytes, length: int) -> bytes:
    """New bytes, ``length`` of them.

    Raises:
        IntegrityError: the payload does not decompress to so many.
    """
    try:
        # The size is checked first because the decompressor takes that much memory at once.
        if zstandard.frame_content_size(payload) != length:
            _refuse(f"new bytes are not {length}")
        return zstandard.ZstdDecompressor().decompress(
            payload, max_output_size=length, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        msg = f"delta: new bytes do not decompress ({error}); fetch the delta again"
        raise IntegrityError(msg) from error


def _take(head: struct.Struct, payload: bytes) -> tuple[Any, ...]:
    if len(payload) < head.size:
        _refuse("a payload ends within its head")
    return head.unpack_from(payload)


def _refuse(why: str) -> NoReturn:
    msg = f"delta: {why}; fetch the delta again"
    raise IntegrityError(msg)
