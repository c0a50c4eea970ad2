"""Metrics of updates on one device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Enum, Gauge

from edge.update.machine import State

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class UpdateMetrics:
    """State, bytes and results.

    Attributes:
        fetched: bytes that came in, those thrown away included, by kind of download.
        updates: how updates ended.
        fresh_until: when what the device believes expires, in seconds since the epoch.
        expired: times that signed metadata was out of date by the clock here.
        unloads: students closed before their successors were open, for want of memory.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._state = Enum(
            "anabranch_update_state",
            "What the update client is doing",
            states=[s.name.lower() for s in State],
            registry=registry,
        )
        self.fetched = Counter(
            "anabranch_update_fetched_bytes",
            "Bytes fetched for updates, those thrown away included",
            ["kind"],
            registry=registry,
        )
        self.updates = Counter(
            "anabranch_updates", "Updates by how they ended", ["result"], registry=registry
        )
        self.unloads = Counter(
            "anabranch_update_unloads",
            "Students closed before their successors were open, for want of memory",
            registry=registry,
        )
        self.expired = Counter(
            "anabranch_update_expired",
            "Times that the cloud's signed metadata was out of date by this device's clock",
            registry=registry,
        )
        self.fresh_until = Gauge(
            "anabranch_trust_fresh_until_timestamp_seconds",
            "Until when this device knows that no newer release is held back from it",
            registry=registry,
        )
        self.fresh_until.set(float("nan"))  # until the cloud was heard
        for kind in ("delta", "file"):
            self.fetched.labels(kind)
        for result in ("committed", "failed"):
            self.updates.labels(result)

    def entered(self, state: State) -> None:
        """Show a new state."""
        self._state.state(state.name.lower())
