"""Distributions to learn from, and how far a student's are from them.

Divergences are per token, in nats, over the teacher's most likely tokens and one bucket for the
rest of the mass, or over the full vocabulary. Merging tokens into a bucket never makes a divergence
larger (data processing), so the bucketed ones are lower bounds, tight where the kept tokens hold
the mass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cloud.learners.config import Divergence
    from cloud.learners.model import SplitModel, Upper
    from cloud.learners.packing import Example

KEPT = 32
"""Tokens that a kept distribution has, where nothing else is said."""


@dataclass(frozen=True)
class Target:
    """A distribution for each answer token: top tokens and the rest of the mass.

    ``ids`` [tokens, kept] int64, or None where ``log_probs`` [tokens, vocabulary] is whole;
    ``log_probs`` [tokens, kept] in nats, the largest first where ``ids`` are given; ``rest``
    [tokens] is the natural log of the mass outside.
    """

    ids: torch.Tensor | None
    log_probs: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, log_probs: torch.Tensor, kept: int = KEPT) -> Target:
        """Keep the largest of ``log_probs`` [tokens, vocabulary]; ``kept`` 0 keeps all."""
        if not kept:
            return cls(None, log_probs, log_probs.new_full((len(log_probs),), -torch.inf))
        top, ids = log_probs.topk(min(kept, log_probs.shape[-1]), dim=-1)
        return cls(ids, top, log_rest(top))

    @property
    def whole(self) -> torch.Tensor:
        """Log-probabilities with the rest as last column: [tokens, kept + 1], or the vocabulary."""
        return self.log_probs if self.ids is None else _with_rest(self.log_probs, self.rest)

    def see(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Another's ``log_probs`` [tokens, vocabulary] over the same outcomes as :attr:`whole`."""
        if self.ids is None:
            return log_probs
        ours = log_probs.gather(1, self.ids)
        return _with_rest(ours, log_rest(ours))

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The most likely token and its log-probability, each [tokens]."""
        if self.ids is None:
            score, token = self.log_probs.max(-1)
            return token, score
        return self.ids[:, 0], self.log_probs[:, 0]

    def score(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability [tokens] of one token each; minus infinity for one not kept."""
        if self.ids is None:
            return self.log_probs.gather(1, tokens[:, None])[:, 0]
        found = self.ids == tokens[:, None]
        return torch.where(found, self.log_probs, -torch.inf).amax(-1)

    def kl(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Forward KL [tokens] in nats from this target to ``log_probs`` [tokens, vocabulary]."""
        return divergence("forward", self.whole, self.see(log_probs))

    def to(self, device: torch.device) -> Target:
        """The same on another device."""
        ids = None if self.ids is None else self.ids.to(device)
        return Target(ids, self.log_probs.to(device), self.rest.to(device))

    def state(self) -> dict[str, torch.Tensor]:
        """For a file; :meth:`from_state` reads it."""
        state = {"log_probs": self.log_probs, "rest": self.rest}
        return state if self.ids is None else state | {"ids": self.ids}

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor]) -> Target:
        """Read what :meth:`state` gave."""
        return cls(state.get("ids"), state["log_probs"], state["rest"])


def log_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """Natural log of one minus the mass of ``log_probs`` [tokens, kept]."""
    inside = log_probs.exp().sum(-1).clamp(max=1 - 1e-6)
    return torch.log1p(-inside)


def _with_rest(log_probs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return torch.cat([log_probs, rest[:, None]], dim=-1)


def divergence(
    kind: Divergence, teacher: torch.Tensor, student: torch.Tensor, beta: float = 0.5
) -> torch.Tensor:
    """Divergence [tokens] in nats between log-probabilities [tokens, outcomes].

    ``forward`` is KL(teacher||student), ``reverse`` KL(student||teacher), ``js`` the generalized
    Jensen-Shannon divergence (Agarwal et al., arXiv 2306.13649): with the mixture
    m = beta * teacher + (1 - beta) * student, beta * KL(teacher||m) + (1 - beta) * KL(student||m).
    """
    if kind == "forward":
        return _kl(teacher, student)
    if kind == "reverse":
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    # Where p is nothing the term is nothing, whatever its logarithm says.
    term = p.exp() * (p - q)
    return torch.where(p == -torch.inf, 0.0, term).sum(-1)


_HALVINGS = 20  # of an interval of length one: a share is met to a millionth


def proximal(student: torch.Tensor, teacher: torch.Tensor, share: float) -> torch.Tensor:
    """The proximal target of iSDFT (github.com/KickItLikeShika/iSDFT), as log-probabilities.

    Of all distributions q that have at least ``share`` (0..1) of the teacher's information on the
    student, ``E_q[log(teacher/student)] >= share * KL(teacher||student)``, the nearest to the
    student by KL(q||student), token by token. It is a geometric mixture of the two, of whose weight
    that expectation is an increasing function; 1 is the teacher. ``student`` and ``teacher``
    [tokens, outcomes] in nats.
    """
    ratio = teacher - student
    least = share * (teacher.exp() * ratio).sum(-1, keepdim=True)
    low, high = torch.zeros_like(least), torch.ones_like(least)
    for _ in range(_HALVINGS):
        weight = (low + high) / 2
        mixture = torch.log_softmax(student + weight * ratio, dim=-1)
        enough = (mixture.exp() * ratio).sum(-1, keepdim=True) >= least
        low, high = torch.where(enough, low, weight), torch.where(enough, weight, high)
    return torch.log_softmax(student + high * ratio, dim=-1)


def join(targets: Sequence[Target]) -> Target:
    """Targets of several sequences behind one another; all are kept alike."""
    ids = [t.ids for t in targets if t.ids is not None]
    return Target(
        torch.cat(ids) if ids else None,
        torch.cat([t.log_probs for t in targets]),
        torch.cat([t.rest for t in targets]),
    )


@torch.no_grad()
def score(
    model: SplitModel,
    upper: Upper,
    examples: Sequence[Example],
    *,
    tokens: int,
    kept: int = KEPT,
    keep: bool = True,
) -> Iterator[Target]:
    """Distributions of ``upper`` along the answers of ``examples``, one target each, in order.

    ``tokens`` is how many are packed in one row; ``keep`` what the frozen layers make of them.
    """
    for part in parts(examples, tokens):
        log_probs = model.log_probs(upper, part, keep=keep)
        for own in torch.split(log_probs, [len(e.answer) for e in part]):
            yield Target.of(own, kept)


def parts(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """Cut a list before a part has more tokens: what is computed at once is kept for the gradient.

    >>> from cloud.learners.packing import Example
    >>> [len(part) for part in parts([Example((), (1, 2, 3), (4, 5))] * 5, 9)]
    [2, 2, 1]
    """
    part: list[Example] = []
    prefixes: set[tuple[int, ...]] = set()
    size = 0
    for example in examples:
        more = len(example.tail) + (example.prefix not in prefixes) * len(example.prefix)
        if part and size + more > tokens:
            yield part
            part, prefixes, size, more = [], set(), 0, example.length
        part.append(example)
        prefixes.add(example.prefix)
        size += more
    if part:
        yield part
