"""Metrics of identity."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

if TYPE_CHECKING:
    from collections.abc import Callable

_RESULTS = ("enrolled", "renewed", "repeated", "refused")


class Refusal(StrEnum):
    """Why a call was refused; the values of a metric's label."""

    IDENTITY = "identity"  # no certificate of ours, or not what the message says
    CERTIFICATE = "certificate"  # revoked, superseded, or expired since the connection began
    STREAMS = "streams"
    BYTES = "bytes"


class IdentityMetrics:
    """Counters and gauges of certificates and of what was refused."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._issued = Counter(
            "anabranch_certificate_requests",
            "Requests of devices for a certificate, by what came of them",
            ["result"],
            registry=registry,
        )
        self._refused = Counter(
            "anabranch_fleet_refused",
            "Calls of devices that the fleet service refused, by reason",
            ["reason"],
            registry=registry,
        )
        self._enrolled = Gauge(
            "anabranch_devices_certified",
            "Devices with a certificate in force",
            registry=registry,
        )
        self.server_expires = Gauge(
            "anabranch_server_certificate_expires_timestamp_seconds",
            "When the certificate of the cloud's gRPC servers ends",
            registry=registry,
        )
        for result in _RESULTS:
            self._issued.labels(result)
        for reason in Refusal:
            self._refused.labels(reason)

    def requested(self, result: str) -> None:
        """Count a request for a certificate: enrolled, renewed, repeated or refused."""
        self._issued.labels(result).inc()

    def refused(self, reason: Refusal) -> None:
        """Count a call that was refused."""
        self._refused.labels(reason).inc()

    def watch_devices(self, certified: Callable[[], int]) -> None:
        """Read the number of devices with a certificate in force at every scrape."""
        self._enrolled.set_function(certified)
