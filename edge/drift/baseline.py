"""What is normal for a signal: learned from the first observations after a swap, with a lag.

An observation enters its baseline only after ``lag`` later ones, so that a sudden change is found
before it can pass for normal. A full baseline is frozen; only a reset starts it anew.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol


class Baseline(Protocol):
    """The reference of one signal, in the signal's own unit."""

    @property
    def mean(self) -> float | None:
        """Mean of the reference period; None before the first observation entered it."""
        ...

    def push(self, value: float) -> None:
        """Take an observation; it enters the reference after ``lag`` more."""
        ...

    def excess(self, value: float) -> float | None:
        """How far ``value`` lies above normal in standard deviations; None before it is known."""
        ...


class _Lagged:
    """Holds the latest ``lag`` observations back from a reference of at most ``capacity``."""

    def __init__(self, *, lag: int, capacity: int) -> None:
        self._held: deque[float] = deque()
        self._lag = lag
        self._capacity = capacity
        self.count = 0

    def push(self, value: float) -> float | None:
        """Hold ``value``; return the one that enters the reference now, if any."""
        if self.count >= self._capacity:
            return None
        self._held.append(value)
        if len(self._held) <= self._lag:
            return None
        self.count += 1
        return self._held.popleft()


class RateBaseline:
    """How often something happens: a Beta posterior around a prior expectation.

    Before anything is known, the prior stands in: a new device is measured against what its
    operator expects. Normal reaches up to one standard error above the mean, so a young baseline
    asks for more evidence than an old one.

    >>> rate = RateBaseline(expected=0.2, weight=20, lag=0, capacity=200)
    >>> for corrected in (0.0, 0.0, 0.0, 1.0):
    ...     rate.push(corrected)
    >>> rate.mean, round(rate.excess(1.0), 2)
    (0.25, 1.75)
    """

    # A student that is almost never wrong has almost no deviation; without a floor two corrections
    # in a row would be an alarm.
    LEAST_DEVIATION = 0.4

    def __init__(self, *, expected: float, weight: int, lag: int, capacity: int) -> None:
        self._prior = (expected * weight, weight)
        self._lagged = _Lagged(lag=lag, capacity=capacity)
        self._happened = 0.0

    @property
    def mean(self) -> float | None:
        """Observed share of the reference period, without the prior."""
        return self._happened / self._lagged.count if self._lagged.count else None

    def push(self, value: float) -> None:
        """Take 1.0 (it happened) or 0.0."""
        entered = self._lagged.push(value)
        if entered is not None:
            self._happened += entered

    def excess(self, value: float) -> float:
        """Deviations above the upper end of normal."""
        happened, weight = self._prior
        n = weight + self._lagged.count
        rate = (happened + self._happened) / n
        deviation = math.sqrt(rate * (1 - rate))
        upper = rate + deviation / math.sqrt(n)
        return (value - upper) / max(deviation, self.LEAST_DEVIATION)


class LevelBaseline:
    """A positive level without a natural scale, such as surprise: mean and deviation of its log.

    Nothing is known before ``least`` observations. Excess is capped, so that one outlier counts as
    no more than a few large values.

    >>> level = LevelBaseline(least=4, lag=0, capacity=200)
    >>> for nats in (0.1, 0.2, 0.1, 0.2):
    ...     assert level.excess(nats) is None
    ...     level.push(nats)
    >>> round(level.mean, 2), level.excess(0.15) < 0.5 < level.excess(1.0)
    (0.15, True)
    """

    FLOOR = 0.01  # nats; answers below it are all equally sure
    LEAST_DEVIATION = 0.1  # of the log; below it a level is as good as constant
    CAP = 3.0

    def __init__(self, *, least: int, lag: int, capacity: int) -> None:
        self._least = least
        self._lagged = _Lagged(lag=lag, capacity=capacity)
        self._sum = self._log_sum = self._log_squares = 0.0

    @property
    def mean(self) -> float | None:
        """Mean of the reference period, in the signal's unit."""
        return self._sum / self._lagged.count if self._lagged.count else None

    def push(self, value: float) -> None:
        """Take a level of 0 or more."""
        entered = self._lagged.push(value)
        if entered is not None:
            log = math.log(self.FLOOR + entered)
            self._sum += entered
            self._log_sum += log
            self._log_squares += log * log

    def excess(self, value: float) -> float | None:
        """Deviations of the log above the upper end of normal, at most :attr:`CAP`."""
        n = self._lagged.count
        if n < self._least:
            return None
        mean = self._log_sum / n
        variance = max(0.0, self._log_squares - n * mean * mean) / (n - 1)
        deviation = max(math.sqrt(variance), self.LEAST_DEVIATION)
        upper = mean + deviation / math.sqrt(n)
        return min((math.log(self.FLOOR + value) - upper) / deviation, self.CAP)
