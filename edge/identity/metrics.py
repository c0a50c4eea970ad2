"""Metrics of a device's certificate."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class CertificateMetrics:
    """When it ends, and how often it could not be renewed.

    Attributes:
        expires: seconds since 1970; 0 without a certificate.
        failed: tries to renew it that failed.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.expires = Gauge(
            "anabranch_certificate_expires_timestamp_seconds",
            "When this device's certificate ends",
            registry=registry,
        )
        self.failed = Counter(
            "anabranch_renewals_failed",
            "Tries to get another certificate that failed",
            registry=registry,
        )
