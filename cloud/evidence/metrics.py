"""Metrics of the evidence that comes in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

from protos.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from cloud.evidence.messages import Reason

OTHER = "other"
"""The label of every channel that is not one of ours: devices choose topics, not label values."""


class IngestMetrics:
    """Counters and gauges of one ingest.

    Args:
        registry: where they are registered.
        channels: the channels that get a label of their own.
    """

    def __init__(self, registry: CollectorRegistry, *, channels: Collection[str]) -> None:
        self._channels = frozenset(channels)
        self.stored = Counter(
            "anabranch_demonstrations_stored",
            "Demonstrations stored for the first time",
            ["channel"],
            registry=registry,
        )
        self.duplicate = Counter(
            "anabranch_demonstrations_duplicate",
            "Demonstrations that came again",
            ["channel"],
            registry=registry,
        )
        self.rejected = Counter(
            "anabranch_messages_rejected",
            "Messages of devices that were not stored, by reason",
            ["channel", "reason"],
            registry=registry,
        )
        self.drift = Counter(
            "anabranch_drift_reports",
            "Drift reports stored for the first time, by kind of drift",
            ["channel", "kind"],
            registry=registry,
        )
        self._online = Gauge(
            "anabranch_devices_online",
            "Devices that are connected",
            ["channel"],
            registry=registry,
        )

    def label(self, channel: str | None) -> str:
        """The label value of a channel; None stands for a topic that names none."""
        return OTHER if channel is None or channel not in self._channels else channel

    def refused(self, channel: str | None, reason: Reason) -> None:
        """Count a message that was not stored."""
        self.rejected.labels(self.label(channel), reason.value).inc()

    def watch_devices(self, online: Callable[[str], int]) -> None:
        """Read the number of online devices of a channel from ``online`` at every scrape."""
        for channel in self._channels:

            def read(channel: str = channel) -> float:
                try:
                    return online(channel)
                except StorageError:
                    return float("nan")  # a broken disk must not take the other metrics along

            self._online.labels(channel).set_function(read)
