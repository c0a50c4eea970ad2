"""Elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796).

Weights that earlier answers depend on are held by a quadratic penalty around where they were; the
diagonal of the empirical Fisher information says how much each matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cloud.learners.objectives import cross_entropy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from cloud.learners.model import SplitModel
    from cloud.learners.packing import Example

SAMPLES = 48
"""Answers that the information is estimated from, at most: one pass each."""


class Ewc:
    """The penalty ``strength / 2 * sum(fisher * (weights - start) ** 2)``, as a gradient.

    Args:
        model: as it is when the job begins.
        earlier: answers to hold on to; evenly spaced ones of them are taken.
        parameters: what is learnt, by name.
        strength: lambda.
    """

    def __init__(
        self,
        model: SplitModel,
        earlier: Sequence[Example],
        parameters: Mapping[str, nn.Parameter],
        strength: float,
    ) -> None:
        self._parameters = parameters
        self._strength = strength
        self._start = {name: p.detach().clone() for name, p in parameters.items()}
        self._fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
        chosen = earlier[:: max(1, -(-len(earlier) // SAMPLES))]
        for example in chosen:
            ours = model.log_probs(model.upper, [example])
            torch.autograd.backward(cross_entropy(ours, example.answer) * len(example.answer))
            for name, p in parameters.items():
                if p.grad is not None:
                    self._fisher[name] += p.grad.square() / len(chosen)
                    p.grad = None

    @torch.no_grad()
    def add_gradient(self) -> None:
        """Add the penalty's gradient to what the parameters have."""
        for name, p in self._parameters.items():
            if p.grad is not None:
                pull = self._fisher[name] * (p - self._start[name])
                p.grad.add_(pull, alpha=self._strength)
