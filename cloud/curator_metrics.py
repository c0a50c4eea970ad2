"""Metrics of the curator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class CuratorMetrics:
    """How adaptations went, and how much there is to learn."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.adaptations = Counter(
            "anabranch_adaptations",
            "Adaptation jobs that ended, by result",
            ["channel", "result"],
            registry=registry,
        )
        self.fraction = Gauge(
            "anabranch_adaptation_phase_fraction",
            "How far the running adaptation is, 0 to 1; 0 when none runs",
            ["channel"],
            registry=registry,
        )
        self.seconds = Gauge(
            "anabranch_sdft_seconds",
            "Seconds that the last adaptation's training took",
            ["channel"],
            registry=registry,
        )
        self.memory = Gauge(
            "anabranch_adaptation_peak_bytes",
            "The most memory that the last adaptation took",
            ["channel"],
            registry=registry,
        )
        self.teacher = Gauge(
            "anabranch_teacher_lead_nats",
            "The teacher's lead over the student on held-out demonstrations, nats a token",
            ["channel"],
            registry=registry,
        )
        labels = ["channel", "check"]
        self.value = Gauge(
            "anabranch_gate_value", "What the gate last measured", labels, registry=registry
        )
        self.bound = Gauge(
            "anabranch_gate_bound", "The bound it was held against", labels, registry=registry
        )
        self.unlearned = Gauge(
            "anabranch_demonstrations_unlearned",
            "Demonstrations worth learning that no release has learnt",
            ["channel"],
            registry=registry,
        )
