"""Ways to bring a learnt update to a device's codes, and what each costs in bytes.

Each gives weights that lie on the frozen scales, so that ``write_back`` turns them into the codes
meant, and the bytes of what would be sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import zstandard

from cloud.students import quantize
from cloud.students.export import read_tensor, tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy.typing as npt

    State = Mapping[str, torch.Tensor]

_BITS = 14  # of the multiplier that a rank's product gets


def rounded(bundle: Path, learnt: State, *, zone: float = 0.5) -> dict[str, torch.Tensor]:
    """Round to nearest, but leave a code that would move by at most ``zone`` steps."""
    found = dict(learnt)
    for name, steps, codes, scales in _matrices(bundle, learnt):
        moved = np.where(np.abs(steps - codes) > zone, np.rint(steps), codes)
        found[name] = _weights(moved, scales)
    return found


def low_rank(
    bundle: Path, masters: State, learnt: State, rank: int
) -> tuple[dict[str, torch.Tensor], int]:
    """The update's best approximation of ``rank``, multiplied in integers and added to the codes.

    The factors are int8, a rank's product has an integer multiplier, and one division by the
    block's scale and a rounding remain: the same codes on every machine. Norms keep their values.

    Returns:
        Weights on the frozen scales; bytes of the factors after zstd.
    """
    torch.manual_seed(0)  # svd_lowrank draws
    found: dict[str, torch.Tensor] = {}  # norms stay as the base has them
    sent = bytearray()
    for name, _, codes, scales in _matrices(bundle, learnt):
        update = learnt[name].double() - masters[name].double()
        left, size, right = torch.svd_lowrank(update, q=min(rank + 8, *update.shape), niter=4)
        root = size[:rank].sqrt()
        up, up_scale = _int8((left[:, :rank] * root).numpy(), axis=0)
        down, down_scale = _int8((right[:, :rank] * root).numpy(), axis=0)
        factor = up_scale * down_scale
        unit = factor.max() / (1 << _BITS)
        multipliers = np.rint(factor / unit)
        # Sums stay far below 2**53: in float64 this product of integers is exact.
        product = (up * multipliers) @ down.T
        blocks = np.repeat(scales.astype(np.float64), codes.shape[1] // scales.shape[1], axis=1)
        found[name] = _weights(codes + np.rint(product * unit / blocks), scales)
        sent += up.astype(np.int8).tobytes() + down.astype(np.int8).tobytes()
        sent += multipliers.astype(np.int16).tobytes() + np.float64(unit).tobytes()
    return found, len(zstandard.ZstdCompressor(level=19).compress(bytes(sent)))


def _int8(
    factor: npt.NDArray[np.float64], axis: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    scale = np.maximum(np.abs(factor).max(axis=axis), 1e-30) / 127
    return np.rint(factor / scale), scale


def _matrices(
    bundle: Path, learnt: State
) -> Iterator[tuple[str, npt.NDArray[np.float32], npt.NDArray[np.float32], quantize.Scales]]:
    """Each learnt matrix: name, weights in steps of its scales, the base's codes, scales."""
    layout = tensors_of(bundle)
    for tensor in layout.values():
        if tensor.dtype != "uint8" or any(s not in learnt for s in tensor.sources):
            continue
        scales = np.array(read_tensor(bundle, layout[f"{tensor.name}.scales"]))
        codes = read_tensor(bundle, tensor).astype(np.float32) - quantize.ZERO
        row = 0
        for name in tensor.sources:
            weight = learnt[name].float().numpy()
            rows = slice(row, row + len(weight))
            row += len(weight)
            steps = weight / np.repeat(scales[rows], codes.shape[1] // scales.shape[1], axis=1)
            yield name, steps, codes[rows], scales[rows]


def _weights(codes: npt.NDArray[np.floating], scales: quantize.Scales) -> torch.Tensor:
    blocks = np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)
    kept = np.clip(codes, -127, 127).astype(np.float32)
    return torch.from_numpy(kept * blocks)
