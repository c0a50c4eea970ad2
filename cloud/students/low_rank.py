"""An update as low-rank products of small integers: a fraction of the bytes of its changed codes.

A matrix's update is ``U = sum of s_k u_k v_k'`` (singular value decomposition). Both vectors of a
component are sent as ``s_k u_k`` and ``s_k v_k``, rounded to integers on one grid of width ``step``
for all matrices. An error of that grid then costs the same wherever it is made, so that bits go
where they are worth most: a component twice as large gets a bit more a number, and one below the
grid none (reverse water-filling: Cover and Thomas, Elements of Information Theory, 10.3.3).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cloud.students.export import tensors_of, write_back
from edge import delta
from edge.delta.payload import pack_factors
from edge.student.bundle import WEIGHTS, read_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from protos.harness import Harness

    State = Mapping[str, torch.Tensor]

MAX_RANK = 160
_STEPS = 7
"""Halvings of the interval of the grid's width, in octaves."""
_OCTAVES = (-14.0, -4.0)


@dataclass(frozen=True)
class _Matrix:
    """Where one source's rows are, and the decomposition of its update."""

    tensor: delta.Tensor
    first: int
    smallest_scale: float
    left: npt.NDArray[np.float64]
    sizes: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]

    def update(self, step: float, phase: int) -> delta.Update | None:
        """The factors on a grid of width ``step``; None: nothing is left of them."""
        left, width = _rounded(self.left * self.sizes, step)
        right, height = _rounded(self.right * self.sizes, step)
        kept = left.any(axis=0) & right.any(axis=0)
        if not kept.any():
            return None
        weights = (width * height / self.sizes)[kept]
        factors = delta.Factors.of(
            left[:, kept], right[:, kept], weights, self.smallest_scale, phase
        )
        return delta.Update(self.tensor, self.first, factors)


def products(
    bundle: Path, before: State, learnt: State, *, budget: int, phase: int = 0
) -> list[delta.Update]:
    """The best products for the updates of all matrices in some ``budget`` bytes.

    Args:
        bundle: holds the codes and scales that the products will be added to.
        before: parameters that the bundle's codes stand for, fp32 by torch name; of fused tensors
            all that are in them.
        learnt: parameters to come near to.
        budget: bytes of all factors.
        phase: of the dither; another for each release.

    Raises:
        InvalidInputError: a matrix is too large for products, or its update for its scales.
    """
    torch.manual_seed(0)  # svd_lowrank draws
    matrices = _matrices(bundle, before, learnt)
    low, high = _OCTAVES
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = _on_grid(matrices, middle, phase)
        fits = _fits(found, budget)
        low, high = (low, middle) if fits else (middle, high)
    return _on_grid(matrices, high, phase)


def reached(
    bundle: Path, before: State, learnt: State, updates: Sequence[delta.Update]
) -> dict[str, torch.Tensor]:
    """The parameters that codes stand for with the products added: all names of ``learnt``.

    Arguments as for :func:`products`, and what it gave. Norms are sent as they were learnt.
    """
    added = {(update.tensor.offset, update.first): update.factors for update in updates}
    found = {n: (v if v.ndim == 1 else before[n]).float().contiguous() for n, v in learnt.items()}
    for offset, first, name in _places(bundle, before):
        factors = added.get((offset, first))
        if factors is not None:
            product = torch.from_numpy(factors.dense())
            found[name] = (found[name].double() + product).float()
    return found


def write_products(
    base: Path, updates: Sequence[delta.Update], learnt: State, harness: Harness, out: Path
) -> None:
    """Write a bundle: the base's codes with the products added, and the norms that were learnt.

    Args:
        base: the bundle whose codes the products are added to.
        updates: as :func:`products` gives them.
        learnt: parameters by torch name; of them only norms are written.
        harness: written as ``harness.json``.
        out: folder to create; replaced whole if it exists.
    """
    norms = {name: value for name, value in learnt.items() if value.ndim == 1}
    work = out.with_name(out.name + ".products")
    write_back(base, norms, harness, work)
    weights = np.memmap(work / WEIGHTS, dtype=np.uint8, mode="r+")
    for update in updates:
        rows = slice(update.first, update.first + len(update.factors.left))
        codes = weights[update.start : update.stop].reshape(-1, update.tensor.columns)
        product = delta.Product(update.factors, update.tensor.block)
        product.add(codes, _scales(weights, update.tensor)[rows], 0)
    weights.flush()
    shutil.rmtree(out, ignore_errors=True)
    work.replace(out)


def _fits(updates: Sequence[delta.Update], budget: int) -> bool:
    """Whether updates take at most ``budget`` bytes; no more are packed than it takes to know."""
    size = 0
    for update in updates:
        size += len(pack_factors([update], [update.tensor]))
        if size > budget:
            return False
    return True


def _on_grid(matrices: Sequence[_Matrix], octave: float, phase: int) -> list[delta.Update]:
    found = (matrix.update(2.0**octave, phase) for matrix in matrices)
    return [update for update in found if update is not None]


def _places(bundle: Path, before: State) -> Iterator[tuple[int, int, str]]:
    """Where each source's codes are: offset of its tensor, first row in it, and its torch name."""
    for tensor in tensors_of(bundle).values():
        first = 0
        for name in tensor.sources if tensor.dtype == "uint8" else ():
            yield tensor.offset, first, name
            first += len(before[name])


def _matrices(bundle: Path, before: State, learnt: State) -> list[_Matrix]:
    weights = np.memmap(bundle / WEIGHTS, dtype=np.uint8, mode="r")
    tensors = {t.offset: t for t in delta.tensors_in(read_config(bundle))}
    found = []
    for offset, first, name in _places(bundle, before):
        if name in learnt:
            tensor, rows = tensors[offset], slice(first, first + len(learnt[name]))
            scales = _scales(weights, tensor)[rows].view(np.float32)
            left, sizes, right = _decomposed(learnt[name].float() - before[name].float())
            found.append(_Matrix(tensor, first, float(scales.min()), left, sizes, right))
    return found


def _decomposed(update: torch.Tensor) -> tuple[npt.NDArray[np.float64], ...]:
    rank = min(MAX_RANK, *update.shape)
    left, sizes, right = torch.svd_lowrank(update, q=rank, niter=3)
    some = sizes > 0
    return tuple(x.double().numpy() for x in (left[:, some], sizes[some], right[:, some]))


def _rounded(
    factor: npt.NDArray[np.float64], step: float
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """Integers of each column and the width of their grid, wider where a byte is too small."""
    width = np.maximum(step, np.abs(factor).max(axis=0, initial=0) / 127)
    return np.rint(factor / width).astype(np.int8), width


def _scales(weights: npt.NDArray[np.uint8], tensor: delta.Tensor) -> npt.NDArray[np.uint32]:
    """The bits of a tensor's scales, [rows, columns / block]."""
    bits: npt.NDArray[np.uint32] = weights[tensor.scales : tensor.scales_stop].view("<u4")
    return bits.reshape(tensor.rows, -1)
