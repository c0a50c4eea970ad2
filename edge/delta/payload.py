"""What operations carry, packed by the coder of ``edge/delta/rans.py``.

CODES::

    size of the steps u32 | escapes u32 | lowest scale u32 | steps | escapes

A byte of the steps is four bytes of the region, two bits each, low bits first: 0 unchanged, 1 is
+1, 2 is -1 (modulo 256), 3 an escape, of which the second sequence has the difference. The last
byte is filled with zeros. Its context says how large the scale of the first of its bytes is
(``Base.contexts`` in ``edge/delta/base.py``).

FACTORS::

    tensor u32 | rows u32 | rank u16 | power i16 | fraction u8 | zero 3 bytes
    | w u16 [rank] | contexts u8 [2, rank] | left [rank, rows], then right [rank, columns]

The last part is one sequence; a column of a factor has one context.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt
import zstandard

from edge.delta import rans
from edge.delta.product import MAX_LEFT, MAX_RIGHT, Factors
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.delta.format import Tensor

Bytes = npt.NDArray[np.uint8]
Contexts = npt.NDArray[np.uint8]

_CODES = struct.Struct("<III")
_FACTORS = struct.Struct("<IIHhB3s")
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


def pack_factors(tensor: int, factors: Factors) -> bytes:
    """The payload of factors of rows of the tensor with that index."""
    head = _FACTORS.pack(
        tensor,
        len(factors.left),
        factors.weights.size,
        factors.power,
        factors.fraction,
        bytes(3),
    )
    classes = np.concatenate([_classes(factors.left), _classes(factors.right)])
    classes = np.unique(classes, return_inverse=True)[1].astype(np.uint8)
    symbols = np.concatenate([factors.left.T.ravel(), factors.right.T.ravel()]).view(np.uint8)
    packed = rans.pack(symbols, _spread(classes, factors.shape))
    return head + factors.weights.astype("<u2").tobytes() + classes.tobytes() + packed


def unpack_factors(payload: bytes, tensors: Sequence[Tensor]) -> tuple[Tensor, Factors]:
    """The factors of a payload and their tensor.

    Raises:
        IntegrityError: the payload is not of factors of one of these tensors.
    """
    index, rows, rank, power, fraction, zero = _take(_FACTORS, payload)
    start = _FACTORS.size + 2 * rank
    if index >= len(tensors) or zero != bytes(3) or len(payload) < start + 2 * rank:
        _refuse("factors are of no tensor")
    tensor = tensors[index]
    columns = tensor.columns
    if not (0 < rows <= tensor.rows and rows * rank <= MAX_LEFT and columns * rank <= MAX_RIGHT):
        _refuse("factors are too large")
    weights = np.frombuffer(payload, "<u2", rank, _FACTORS.size).astype(np.uint16)
    classes = np.frombuffer(payload, np.uint8, 2 * rank, start)
    contexts = _spread(classes, (rows, columns))
    symbols = rans.unpack(payload[start + 2 * rank :], contexts.size, contexts).view(np.int8)
    left = symbols[: rows * rank].reshape(rank, rows).T
    right = symbols[rows * rank :].reshape(rank, columns).T
    return tensor, Factors(left, right, weights, power, fraction)


def _spread(classes: Contexts, shape: tuple[int, int]) -> Contexts:
    """A context for each number of both factors, from one for each of their columns."""
    rank = classes.size // 2
    return np.repeat(classes, np.repeat(shape, rank))


def _classes(factor: npt.NDArray[np.int8]) -> Contexts:
    """How large the numbers of each column are, in half octaves."""
    power = np.square(factor.astype(np.float64)).mean(axis=0)
    return np.clip(np.rint(np.log2(power + 1 / 64)) + 6, 0, 2 * _CONTEXTS).astype(np.uint8)


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


def _take(head: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) < head.size:
        _refuse("a payload ends within its head")
    return head.unpack_from(payload)


def _refuse(why: str) -> NoReturn:
    msg = f"delta: {why}; fetch the delta again"
    raise IntegrityError(msg)
