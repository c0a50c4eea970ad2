"""Low-rank adapters on linear maps (Hu et al., arXiv 2106.09685), in the end merged."""

from __future__ import annotations

import math

import torch
from torch import nn


class LoraLinear(nn.Module):
    """A frozen linear map plus ``scale * up @ down``; ``up`` starts at zero.

    Args:
        base: weight [out, in], without a bias.
        rank: columns of ``up`` [out, rank] and rows of ``down`` [rank, in].
        scale: factor of the product.
        generator: draws ``down``.
    """

    def __init__(
        self, base: nn.Linear, *, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        out, width = base.weight.shape
        self.base = base
        self.scale = scale
        bound = 1 / math.sqrt(width)
        down = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(out, rank, device=base.weight.device))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        low = nn.functional.linear(hidden, self.down)
        out: torch.Tensor = self.base(hidden) + self.scale * nn.functional.linear(low, self.up)
        return out

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """The weight [out, in] that one linear map would need."""
        return self.base.weight + self.scale * self.up @ self.down


def adapt(layer: nn.Module, *, rank: int, scale: float, generator: torch.Generator) -> None:
    """Give every linear map within ``layer`` an adapter, in place."""
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and not isinstance(module, LoraLinear):
                adapter = LoraLinear(child, rank=rank, scale=scale, generator=generator)
                setattr(module, name, adapter)
