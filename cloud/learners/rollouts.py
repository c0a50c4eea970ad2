"""Guided rollouts, drafted by the demonstration.

While the guided walk agrees with the demonstration one pass of each model scores every token, and
where the walk leaves it the rollout is cut. Nearly all agree, because a teacher of worth copies
what it was shown; the share that left is reported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloud.learners.targets import Target


@dataclass(frozen=True)
class Walk:
    """A guided walk along a draft: how many tokens it went, the share it replaced, was it cut."""

    walked: int
    replaced: float
    cut: bool


def guided_walk(
    student: torch.Tensor, teacher: Target, draft: Sequence[int], guidance: float
) -> Walk:
    """Walk the guided rollout along ``draft``.

    At each token the student's best stands if the teacher gives it ``guidance`` of its own best
    token's probability, else the teacher's best replaces it (after speculative knowledge
    distillation, arXiv 2410.11325).

    Args:
        student: log-probabilities [tokens, vocabulary].
        teacher: its distribution at the same tokens.
        draft: token ids of the answer that both scored.
        guidance: 0..1; at 0 every proposal stands.
    """
    proposal = student.argmax(-1)
    best, score = teacher.best()
    least = score + math.log(guidance) if guidance else torch.full_like(score, -torch.inf)
    stands = teacher.score(proposal) >= least
    rollout = torch.where(stands, proposal, best)
    departures = (rollout != torch.tensor(draft, device=student.device)).nonzero()
    walked = int(departures[0, 0]) + 1 if len(departures) else len(draft)
    return Walk(walked, float((~stands).float().mean()), walked < len(draft))
