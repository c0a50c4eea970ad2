"""Metrics of the link."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

from protos.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.link.outbox import Counts


class LinkMetrics:
    """Counters and gauges of one device's link.

    Attributes:
        sent: demonstrations published; one that is sent again counts again.
        acknowledged: demonstrations that the cloud has stored and that have left the outbox.
        put_off: messages that the cloud did not take for now; they stay in the outbox.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._outbox = Gauge(
            "anabranch_outbox_demonstrations",
            "Demonstrations in the outbox: waiting to be sent, in flight, or rejected by the cloud",
            ["state"],
            registry=registry,
        )
        self.sent = Counter(
            "anabranch_demonstrations_sent",
            "Demonstrations published, repeated sends included",
            registry=registry,
        )
        self.acknowledged = Counter(
            "anabranch_demonstrations_acknowledged",
            "Demonstrations that the cloud has stored",
            registry=registry,
        )

        self.put_off = Counter(
            "anabranch_messages_put_off",
            "Messages that the cloud did not take for now, over a quota or without a certificate",
            registry=registry,
        )

    def watch(self, counts: Callable[[], Counts], in_flight: Callable[[], int]) -> None:
        """Read the gauges from these at every scrape."""

        def reading(value: Callable[[], int]) -> Callable[[], float]:
            def read() -> float:
                try:
                    return value()
                except StorageError:
                    return float("nan")  # a broken disk must not take the other metrics along

            return read

        states: dict[str, Callable[[], int]] = {
            "waiting": lambda: max(0, counts().waiting - in_flight()),
            "in_flight": in_flight,
            "rejected": lambda: counts().rejected,
        }
        for state, value in states.items():
            self._outbox.labels(state).set_function(reading(value))
