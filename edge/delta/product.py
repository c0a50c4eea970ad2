"""A low-rank product that is added to codes, in integers: the same codes on every machine.

An update ``U`` of a matrix is close to ``left @ diag(w) @ right.T`` with few columns. ``left`` and
``right`` are signed bytes, ``w`` unsigned 16-bit integers on a common power of two. What is added
to code ``[i, j]`` is the product in steps of the code's scale, rounded by an ordered dither::

    sum  = sum over k of left[i, k] * w[k] * right[j, k]        below 2**38
    rate = floor(2**(power - exponent) / mantissa)              at most 2**24 - 1, of the scale
    step = floor((sum * rate + (dither << fraction - 16)) / 2**fraction)
    code = min(max(code + step, 1), 255)

A scale is an fp32 number in the base file: ``mantissa * 2**exponent`` with 24 bits of mantissa. It
must be normal and above zero. The dither of row i and column j of the product, from 0 on, is
``(49472 * i + 37345 * j + phase) mod 2**16``: the two-dimensional Kronecker sequence of the plastic
number (Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018). It is why an
update of a tenth of a step is not lost: one in ten codes takes it, spread evenly. With another
``phase`` other codes take it: else those of one update would take the next one's as well.

The sums are computed in float64, where a product and a sum of integers below 2**53 are exact in
any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from protos.errors import IntegrityError, InvalidInputError

MAX_RANK = 1024
MAX_NUMBERS = 1 << 22
"""Of all factors that are held in memory at once."""
MAX_RIGHT = 1 << 19
"""Numbers of a right factor, of which one is held at eight bytes each."""
_SUM_BITS, _RATE_BITS = 38, 24
_FRACTIONS = range(16, 61)
_PHASES = range(1 << 16)
_NOT_FINITE = 255
"""The exponent of what is infinite or no number; with a sign before it, it is higher."""
_DITHER = (49472, 37345)
_LOWEST, _HIGHEST = 1, 255
_TILE = 1 << 17
"""Codes of a tile: it and its integers stay in a cache, and in bounded memory."""
_ONE_THREAD = 1 << 18
"""Multiplications of a product that OpenBLAS does not spread over threads."""

Bytes = npt.NDArray[np.uint8]
Signed = npt.NDArray[np.int8]
Bits = npt.NDArray[np.uint32]
Whole = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Factors:
    """An update of a matrix ``[rows, columns]`` (see the module).

    Attributes:
        left: int8 [rows, rank].
        right: int8 [columns, rank].
        weights: uint16 [rank], ``w``.
        power: of two, from the sum and the scale to the rate.
        fraction: bits below one step, 16 to 60.
        phase: of the dither, 16 bits.
    """

    left: Signed
    right: Signed
    weights: npt.NDArray[np.uint16]
    power: int
    fraction: int
    phase: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be computed exactly, or not in bounded memory.

        Raises:
            IntegrityError: a bound is passed.
        """
        rank = self.weights.size
        right = (
            0 < rank <= MAX_RANK
            and self.left.shape[1:] == self.right.shape[1:] == (rank,)
            and 0 < self.left.size <= MAX_NUMBERS
            and 0 < self.right.size <= MAX_RIGHT
            and self.fraction in _FRACTIONS
            and self.phase in _PHASES
            and self._largest() < 1 << _SUM_BITS
        )
        if not right:
            msg = (
                f"delta: factors of rank {rank} for {len(self.left)} rows and {len(self.right)} "
                "columns are out of bounds; fetch the delta again"
            )
            raise IntegrityError(msg)

    def _largest(self) -> int:
        """What no sum exceeds."""
        return int((self.weights * _peaks(self.left) * _peaks(self.right)).sum())

    @classmethod
    def of(
        cls,
        left: Signed,
        right: Signed,
        weights: npt.NDArray[np.float64],
        scale: float,
        phase: int = 0,
    ) -> Self:
        """Factors of ``left @ diag(weights) @ right.T``, the update of a matrix of weights.

        Args:
            left: int8 [rows, rank].
            right: int8 [columns, rank].
            weights: [rank], not negative; kept to 16 bits of the largest.
            scale: the smallest scale of the matrix.
            phase: of the dither.

        Raises:
            InvalidInputError: the update is too large for the scales, or nothing.
        """
        unit = int(np.ceil(np.log2(weights.max(initial=0) or 1))) - 16
        whole = np.minimum(np.rint(weights / 2.0**unit), (1 << 16) - 1).astype(np.uint16)
        fraction = _RATE_BITS - 1 + int(np.floor(np.log2(scale))) - unit
        fraction = min(fraction, _FRACTIONS[-1])
        try:
            return cls(left, right, whole, unit + fraction, fraction, phase)
        except IntegrityError as error:
            msg = f"an update cannot be sent as a product: {error}"
            raise InvalidInputError(msg) from error

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return len(self.left), len(self.right)

    def dense(self) -> npt.NDArray[np.float64]:
        """The update before it is rounded to steps: weights, [rows, columns]."""
        sizes = np.ldexp(self.weights.astype(np.float64), self.power - self.fraction)
        left, right = self.left.astype(np.float64), self.right.astype(np.float64)
        product: npt.NDArray[np.float64] = (left * sizes) @ right.T
        return product


class Product:
    """Adds factors to rows of codes, of which each ``block`` in a row have one scale."""

    def __init__(self, factors: Factors, block: int) -> None:
        rank, columns = factors.weights.size, len(factors.right)
        self._factors = factors
        self._block = block
        # Block by block, [blocks, rank, block]: products so small are computed by one thread, and
        # the student that serves meanwhile keeps the others.
        self._right = np.ascontiguousarray(
            factors.right.reshape(columns // block, block, rank).transpose(0, 2, 1), np.float64
        )
        self._height = max(min(_TILE // columns, _ONE_THREAD // (block * rank)), 1)
        dither = np.arange(columns, dtype=np.int64) * _DITHER[1] + factors.phase
        self._dither = dither.reshape(-1, 1, block)

    def add(self, codes: Bytes, scales: Bits, first: int) -> None:
        """Add the product to ``codes`` in place.

        Args:
            codes: [n, columns], rows ``first`` to ``first + n`` of the matrix.
            scales: the bits of their scales, [n, columns / block].
            first: a row.

        Raises:
            IntegrityError: a scale is no positive normal number.
        """
        rates = _rates(scales, self._factors.power)
        for start in range(0, len(codes), self._height):
            rows = slice(start, start + self._height)
            blocks = codes[rows].reshape(len(codes[rows]), -1, self._block)
            steps = self._steps(first + start, rates[rows])
            steps += blocks.transpose(1, 0, 2)
            blocks[:] = np.clip(steps, _LOWEST, _HIGHEST, out=steps).transpose(1, 0, 2)

    def _steps(self, first: int, rates: Whole) -> Whole:
        """What is added to rows from ``first`` on, [columns / block, rows, block]."""
        fraction = self._factors.fraction
        left = self._factors.left[first : first + len(rates)]
        steps = ((left * self._factors.weights.astype(np.float64)) @ self._right).astype(np.int64)
        steps *= rates.T[:, :, None]
        rows = np.arange(first, first + len(rates), dtype=np.int64) * _DITHER[0]
        dither = rows[:, None] + self._dither
        dither &= (1 << 16) - 1
        dither <<= fraction - 16
        steps += dither
        steps >>= fraction
        return steps


def _peaks(factor: Signed) -> Whole:
    """The largest magnitude in each column."""
    low, high = (f(axis=0, initial=0).astype(np.int64) for f in (factor.min, factor.max))
    peaks: Whole = np.maximum(high, -low)
    return peaks


def _rates(scales: Bits, power: int) -> Whole:
    """Steps of a scale in one unit of the sum, in fixed point."""
    exponent = (scales >> np.uint32(23)).astype(np.int64)  # with the sign, so that 256 is negative
    mantissa = (scales & np.uint32((1 << 23) - 1) | np.uint32(1 << 23)).astype(np.int64)
    if ((exponent == 0) | (exponent >= _NOT_FINITE)).any():
        msg = "delta: factors do not fit the base's scales; fetch the full file"
        raise IntegrityError(msg)
    shift = np.clip(power - (exponent - 150), 0, 62)  # 2**0 // mantissa is 0, as for any below
    rates: Whole = np.minimum((np.int64(1) << shift) // mantissa, (1 << _RATE_BITS) - 1)
    return rates
