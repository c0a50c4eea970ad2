"""One signal's detectors: River's Page-Hinkley test, kept to the direction of harm.

River's test subtracts its own running mean, which would follow the very change that it should
find. So it is given differences to a known reference and an imagined past of zeros, which holds
its running mean still; what is left is Page's one-sided CUSUM.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.drift.baseline import Baseline

_IMAGINED_PAST = 2000  # observations; two hundred real ones move its mean by less than a tenth
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


class Test(Protocol):
    """What is used of a detector of River."""

    @property
    def drift_detected(self) -> bool:
        """Whether the last update found a change."""
        ...

    def update(self, x: float) -> None:
        """Take one value."""
        ...


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
        self._shift: Test | None = _cusum(self._limits.slack, self._limits.shift)
        self._level: Test | None = None
        if self._limits.expected is not None:
            self._level = _cusum(self._limits.margin, self._limits.level)
        self._calm = True

    def observe(self, value: float) -> Fired | None:
        """Take one observation of the signal."""
        self._recent.append(value)
        if self._level is not None and self._limits.expected is not None:
            self._level.update(value - self._limits.expected)
            if self._level.drift_detected:
                self._shift = self._level = None
                self._calm = False
                return Fired(decisive=True)
        excess = self._baseline.excess(value)
        if self._calm:
            self._baseline.push(value)
        if self._shift is not None and excess is not None:
            self._shift.update(excess)
            if self._shift.drift_detected:
                self._shift = None
                self._calm = False
                return Fired(decisive=False)
        return None


def _cusum(slack: float, threshold: float) -> Test:
    return copy.deepcopy(_primed(slack, threshold))


@functools.cache
def _primed(slack: float, threshold: float) -> Test:
    test: Test = _page_hinkley()(
        min_instances=1, delta=slack, threshold=threshold, alpha=1.0, mode="up"
    )
    for _ in range(_IMAGINED_PAST):
        test.update(0.0)
    return test


@functools.cache
def _page_hinkley() -> Any:  # noqa: ANN401 - River has no types
    """River's ``PageHinkley``, out of its one file.

    The package around it imports every detector, and scipy.stats, pandas and SQLAlchemy with them:
    85 MB more at rest, and seconds of a device's start.
    """
    package = importlib.util.find_spec("river")
    folders = package.submodule_search_locations if package else None
    path = Path(folders[0] if folders else "") / "drift" / "page_hinkley.py"
    spec = importlib.util.spec_from_file_location(f"{__name__}.page_hinkley", path)
    if path.is_file() and spec and spec.loader:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.PageHinkley
    from river.drift import PageHinkley  # noqa: PLC0415 - a River that is laid out otherwise

    return PageHinkley
