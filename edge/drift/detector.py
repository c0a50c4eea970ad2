"""One signal's detectors: Page's one-sided CUSUM over differences to a known reference.

It is what River's ``PageHinkley(mode="up")`` does where its running mean is held at zero, without
the 85 MB of memory and the seconds that importing River costs a device (docs/adr/0011).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.drift.baseline import Baseline

_RECENT = 20


@dataclass(frozen=True)
class Limits:
    """When a signal is called changed.

    Attributes:
        slack: deviations above normal that are tolerated for ever.
        shift: deviations, summed beyond the slack, that make a vote.
        expected: for a rate: how often it may happen, whatever was normal before.
        margin: what is tolerated above ``expected`` for ever.
        level: events, summed beyond ``expected + margin``, that make a decisive vote.
    """

    slack: float
    shift: float
    expected: float | None = None
    margin: float = 0.35
    level: float = 5.0


class Cusum:
    """Page's one-sided cumulative sum: finds that a mean of zero has become larger.

    E. S. Page, Continuous Inspection Schemes, Biometrika 41 (1954).

    Args:
        slack: what each value may exceed zero by for ever.
        threshold: of the sum of what exceeds that.

    >>> test = Cusum(slack=0.5, threshold=2.0)
    >>> [test.update(x) for x in (0.0, 1.0, 1.0, 2.0)]
    [False, False, False, True]
    """

    def __init__(self, *, slack: float, threshold: float) -> None:
        self._slack = slack
        self._threshold = threshold
        self._sum = 0.0

    def update(self, value: float) -> bool:
        """Take one value; tell whether the sum is over the threshold."""
        self._sum = max(0.0, self._sum + value - self._slack)
        return self._sum > self._threshold


@dataclass(frozen=True)
class Fired:
    """A detector fired; ``decisive`` when what is acceptable at all was passed, not just normal."""

    decisive: bool


class Detector:
    """Watches one signal, against what was normal for it and against what is acceptable at all.

    Either of the two speaks once, until it is told to :meth:`rearm` or to :meth:`restart`. What was
    observed since one of them spoke does not become normal.
    """

    def __init__(self, *, limits: Limits, baseline: Callable[[], Baseline]) -> None:
        self._limits = limits
        self._new_baseline = baseline
        self.restart()

    @property
    def baseline(self) -> float | None:
        """Mean of the reference period."""
        return self._baseline.mean

    @property
    def recent(self) -> float | None:
        """Mean of the latest observations."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    def restart(self) -> None:
        """Forget what was normal: another student serves, or the world has settled anew."""
        self._baseline = self._new_baseline()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.rearm()

    def rearm(self) -> None:
        """Start to count from zero, with the same normal."""
        limits = self._limits
        self._shift: Cusum | None = Cusum(slack=limits.slack, threshold=limits.shift)
        self._level: Cusum | None = None
        if limits.expected is not None:
            self._level = Cusum(slack=limits.margin, threshold=limits.level)
        self._calm = True

    def observe(self, value: float) -> Fired | None:
        """Take one observation of the signal."""
        self._recent.append(value)
        level, expected = self._level, self._limits.expected
        if level is not None and expected is not None and level.update(value - expected):
            self._shift = self._level = None
            self._calm = False
            return Fired(decisive=True)
        excess = self._baseline.excess(value)
        if self._calm:
            self._baseline.push(value)
        if self._shift is not None and excess is not None and self._shift.update(excess):
            self._shift = None
            self._calm = False
            return Fired(decisive=False)
        return None
