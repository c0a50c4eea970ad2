"""Ways to bring a learnt update to a device's codes, and what each costs in bytes.

Each gives weights that lie on the frozen scales, so that ``write_back`` turns them into the codes
meant, and the bytes of what would be sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cloud.students import low_rank, quantize
from cloud.students.export import given, read_tensor, tensors_of
from edge.delta import Product
from edge.delta.payload import pack_factors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

    State = Mapping[str, torch.Tensor]


def rounded(bundle: Path, learnt: State, *, zone: float = 0.5) -> dict[str, torch.Tensor]:
    """Round to nearest, but leave a code that would move by at most ``zone`` steps."""
    found = dict(learnt)
    for name, _, steps, codes, scales in _matrices(bundle, learnt):
        moved = np.where(np.abs(steps - codes) > zone, np.rint(steps), codes)
        found[name] = _weights(moved, scales)
    return found


def products(
    bundle: Path, masters: State, learnt: State, budget: int
) -> tuple[dict[str, torch.Tensor], int]:
    """The base's codes with low-rank products in some ``budget`` bytes (``cloud.students``).

    Returns:
        Weights on the frozen scales; bytes of the factors. Norms keep the base's values.
    """
    updates = low_rank.products(bundle, masters, learnt, budget=budget)
    size = sum(len(pack_factors([u], [u.tensor])) for u in updates)
    known = {u.start: u for u in updates}
    found: dict[str, torch.Tensor] = {}
    for name, place, _, codes, scales in _matrices(bundle, learnt):
        moved = (codes + quantize.ZERO).astype(np.uint8)
        update = known.get(place)
        if update is not None:
            Product(update.factors, quantize.BLOCK).add(moved, scales.view(np.uint32), 0)
        found[name] = _weights(moved.astype(np.float32) - quantize.ZERO, scales)
    return found, size


def _matrices(
    bundle: Path, learnt: State
) -> Iterator[tuple[str, int, quantize.Weights, quantize.Weights, quantize.Scales]]:
    """Each learnt matrix: name, offset, weights in steps of its scales, base's codes, scales."""
    layout = tensors_of(bundle)
    for tensor in given(layout, learnt):
        if tensor.dtype != "uint8":
            continue
        scales = np.array(read_tensor(bundle, layout[f"{tensor.name}.scales"]))
        codes = read_tensor(bundle, tensor).astype(np.float32) - quantize.ZERO
        row = 0
        for name in tensor.sources:
            weight = learnt[name].float().numpy()
            rows = slice(row, row + len(weight))
            place = tensor.offset + row * tensor.shape[1]
            row += len(weight)
            steps = quantize.in_steps(weight, scales[rows])
            yield name, place, steps, codes[rows], scales[rows]


def _weights(codes: npt.NDArray[np.floating], scales: quantize.Scales) -> torch.Tensor:
    blocks = np.repeat(scales, quantize.BLOCK, axis=1)
    kept = np.clip(codes, -127, 127).astype(np.float32)
    return torch.from_numpy(kept * blocks)
