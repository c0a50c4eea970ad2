"""What a teacher is worth, measured before anything is learnt from it.

A weak in-context learner makes a weak teacher (arXiv 2601.19897, on 3B models). On demonstrations
that are not learnt, the teacher that was shown one is compared with the student that was not: by
the mean log-probability a token of the right answer, paired, and by how many it would copy whole.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloud.learners.targets import Target

# One-sided 95% quantiles of Student's t by degrees of freedom; beyond, the last is near enough.
_T_95 = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812),
    *(1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725),
)
LEAST_COPIES = 0.5
"""Share of held-out demonstrations that a teacher of worth copies to the letter."""


@dataclass(frozen=True)
class Worth:
    """Teacher against student on ``asked`` held-out demonstrations.

    ``gain`` is the teacher's lead in nats a token and ``error`` its standard error; shares 0..1 of
    answers that each would write to the letter.
    """

    asked: int
    gain: float
    error: float
    teacher_copies: float
    student_copies: float

    @property
    def clear(self) -> bool:
        """Whether the teacher is clearly better: its lead beyond chance, most answers copied."""
        quantile = _T_95[min(max(self.asked - 1, 1), len(_T_95)) - 1]
        return self.gain > quantile * self.error and self.teacher_copies >= LEAST_COPIES

    def __str__(self) -> str:
        """For people: one sentence."""
        return (
            f"on {self.asked} held-out demonstrations the teacher leads by {self.gain:.2f} "
            f"± {self.error:.2f} nats a token and copies {self.teacher_copies:.0%} "
            f"(the student says {self.student_copies:.0%})"
        )


def measure(
    teacher: Sequence[Target], student: Sequence[Target], answers: Sequence[Sequence[int]]
) -> Worth:
    """Compare two scorings of the same answers (token ids); at least one is needed."""
    theirs = [_fit(t, a) for t, a in zip(teacher, answers, strict=True)]
    ours = [_fit(t, a) for t, a in zip(student, answers, strict=True)]
    leads = [t[0] - s[0] for t, s in zip(theirs, ours, strict=True)]
    error = statistics.stdev(leads) / math.sqrt(len(leads)) if len(leads) > 1 else math.inf
    count = len(leads)
    return Worth(
        count,
        statistics.fmean(leads),
        error,
        sum(t[1] for t in theirs) / count,
        sum(s[1] for s in ours) / count,
    )


def _fit(target: Target, answer: Sequence[int]) -> tuple[float, bool]:
    """Mean log-probability a token, and whether each token is the best one.

    A token outside the kept ones has at most the rest's mass: that bound stands for it.
    """
    tokens = torch.tensor(answer, device=target.log_probs.device)
    score = torch.maximum(target.score(tokens), target.rest)
    best, _ = target.best()
    return float(score.mean()), bool((best == tokens).all())
