"""Metrics of rollouts, counted when they are scraped: nothing stale, and no device in a label."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from cloud.rollout.state import Health, Phase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from cloud.rollout.state import Rollout


class RolloutCollector(Collector):
    """Reads the rollouts' states at each scrape."""

    def __init__(self, states: Callable[[], Mapping[str, Rollout]]) -> None:
        self._states = states

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges of every channel."""
        devices = GaugeMetricFamily(
            "anabranch_rollout_devices",
            "Devices by wave of the newest release's rollout (none: not told yet) and state.",
            labels=["channel", "wave", "state"],
        )
        version = GaugeMetricFamily(
            "anabranch_release_version",
            "Version of the newest release that was rolled out.",
            labels=["channel"],
        )
        phases = GaugeMetricFamily(
            "anabranch_rollout_state",
            "1 for the state that the channel's rollout is in, else 0.",
            labels=["channel", "state"],
        )
        for channel, state in self._states().items():
            counts = Counter((d.wave, d.health) for d in state.devices.values())
            for wave in (None, *range(len(state.plan.waves))):
                for health in Health:
                    label = "none" if wave is None else str(wave)
                    devices.add_metric([channel, label, health], counts[wave, health])
            version.add_metric([channel], state.version)
            for phase in Phase:
                phases.add_metric([channel, phase], float(phase is state.phase))
        yield from (devices, version, phases)
