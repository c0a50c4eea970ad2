"""The base as a delta sees it: its bytes, with the product of the present factors added."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge.delta.product import Product
from protos.errors import WrongBaseError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import BufferedReader

    from edge.delta.format import Tensor
    from edge.delta.payload import Update

Bytes = npt.NDArray[np.uint8]
Contexts = npt.NDArray[np.uint8]

CONTEXTS = 16
_CLASS_BITS = 22
"""Bits of an fp32 number below its class: two classes an octave are left."""


class Base:
    """Reads a base; ``tensors`` are in the order of their offsets."""

    def __init__(self, file: BufferedReader, tensors: Sequence[Tensor]) -> None:
        self._file = file
        self._tensors = tensors
        self._starts = [t.offset for t in tensors]
        self._updates: Sequence[Update] = ()
        self._product: tuple[Update, Product] | None = None

    def add(self, updates: Sequence[Update]) -> None:
        """From now on add these products where they belong, and no earlier ones."""
        self._updates, self._product = updates, None

    def read(self, offset: int, size: int) -> Bytes:
        """Bytes from ``offset`` on, in an array that may be written to."""
        block = self._raw(offset, size)
        for update in self._updates:
            low, high = max(offset, update.start), min(offset + size, update.stop)
            if low < high:
                block[low - offset : high - offset] = self._added(update, low, high)
        return block

    def _added(self, update: Update, low: int, high: int) -> Bytes:
        """Codes of the places from ``low`` to ``high`` with a product that covers them."""
        if self._product is None or self._product[0] is not update:
            self._product = None  # before another one takes memory
            self._product = update, Product(update.factors, update.tensor.block)
        columns = update.tensor.columns
        first, last = (low - update.start) // columns, -(-(high - update.start) // columns)
        start = update.start + first * columns
        codes = self._raw(start, (last - first) * columns)
        scales = self._scales(update.tensor, update.first + first, last - first)
        self._product[1].add(codes.reshape(-1, columns), scales, first)
        return codes[low - start : high - start]

    def contexts(self, offset: int, size: int, lowest: int | None) -> tuple[Contexts, int]:
        """The context of each four of ``size`` bytes from ``offset`` on.

        It is how many half octaves the scale of the first of the four lies above ``lowest``, 0 to
        15, and 0 outside of tensors.

        Returns:
            The contexts [ceil(size / 4)], and the lowest: the one given, or that of these bytes.
        """
        places = np.arange(offset, offset + size, 4, dtype=np.int64)
        classes = np.zeros(places.size, np.int64)
        known = np.zeros(places.size, np.bool_)
        nearest = max(bisect_right(self._starts, offset) - 1, 0)
        for tensor in self._tensors[nearest:]:
            if tensor.offset >= offset + size:
                break
            inside = slice(*np.searchsorted(places, (tensor.offset, tensor.stop)))
            if inside.start == inside.stop:
                continue
            blocks = (places[inside] - tensor.offset) // tensor.block
            bits = self._raw(
                tensor.scales + 4 * int(blocks[0]), 4 * int(blocks[-1] - blocks[0] + 1)
            )
            classes[inside] = (bits.view("<u4") >> _CLASS_BITS)[blocks - blocks[0]]
            known[inside] = True
        if lowest is None:
            lowest = int(classes[known].min(initial=1 << 10)) if known.any() else 0
        classes = np.where(known, np.clip(classes - lowest, 0, CONTEXTS - 1), 0)
        return classes.astype(np.uint8), lowest

    def _scales(self, tensor: Tensor, first: int, rows: int) -> npt.NDArray[np.uint32]:
        width = tensor.columns // tensor.block
        raw = self._raw(tensor.scales + 4 * first * width, 4 * rows * width)
        return raw.view("<u4").astype(np.uint32).reshape(rows, width)

    def _raw(self, offset: int, size: int) -> Bytes:
        block = np.empty(size, np.uint8)
        self._file.seek(offset)
        if self._file.readinto(block.data) != size:
            msg = "delta: the base became shorter while it was read; fetch the full file"
            raise WrongBaseError(msg)
        return block
