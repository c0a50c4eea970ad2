"""All metrics of a device in one place, but for those of the link and of updates.

``edge/link/metrics.py`` and ``edge/update/metrics.py`` register theirs with the same registry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import InfoMetricFamily
from prometheus_client.registry import Collector

from edge.drift.vote import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client import CollectorRegistry

    from edge.drift.monitor import SignalState

OUTCOMES = ("ok", "invalid", "busy", "abandoned", "failed")
"""Answered; request at fault; too many waited; client hung up; device at fault."""

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10)
_SHORT = 12


class DeviceMetrics:
    """Requests, drift, memory and the student in service.

    Attributes:
        requests: chat requests by outcome, see :data:`OUTCOMES`.
        seconds: from a request's arrival to its answer's last token, of answered requests.
        tokens: tokens of answers.
        feedback: judgements by people, ``correction`` or ``confirmation``.
        alarms: drift alarms by kind.
        memory_left: demonstrations that left a full working memory for newer ones.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "anabranch_requests", "Chat requests", ["outcome"], registry=registry
        )
        self.seconds = Histogram(
            "anabranch_request_seconds",
            "Seconds from a request's arrival to its answer's last token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = Counter("anabranch_answer_tokens", "Tokens of answers", registry=registry)
        self.feedback = Counter(
            "anabranch_feedback", "Answers judged by people", ["source"], registry=registry
        )
        self._signal = Gauge(
            "anabranch_drift_signal",
            "Mean of a drift signal over the latest answers, in its own unit",
            ["signal"],
            registry=registry,
        )
        self.alarms = Counter("anabranch_drift_alarms", "Drift alarms", ["kind"], registry=registry)
        self._memory = Gauge(
            "anabranch_memory_demonstrations",
            "Demonstrations in working memory",
            registry=registry,
        )
        self.memory_left = Counter(
            "anabranch_memory_demonstrations_left",
            "Demonstrations that left a full working memory for newer ones",
            registry=registry,
        )
        self._registry = registry
        for outcome in OUTCOMES:
            self.requests.labels(outcome)
        for kind in Kind:
            self.alarms.labels(kind.value)

    def signals(self, states: Iterable[SignalState]) -> None:
        """Show the drift signals."""
        for state in states:
            if state.recent is not None:
                self._signal.labels(state.name).set(state.recent)

    def watch_student(self, serving: Callable[[], tuple[str, int]]) -> None:
        """Read the student's digest and its release's version at every scrape."""
        self._registry.register(_StudentInfo(serving))

    def watch_memory(self, size: Callable[[], int]) -> None:
        """Read the size of working memory at every scrape."""
        self._memory.set_function(size)


class _StudentInfo(Collector):
    """The student in service, as it is at the scrape."""

    def __init__(self, serving: Callable[[], tuple[str, int]]) -> None:
        self._serving = serving

    def collect(self) -> Iterator[InfoMetricFamily]:
        student, release = self._serving()
        yield InfoMetricFamily(
            "anabranch_student",
            "The student in service",
            value={"digest": student[:_SHORT], "release": str(release)},
        )
