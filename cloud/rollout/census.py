"""How many devices stand where, counted on as they change.

The rules ask after every event how many failed, committed or wait. With ten thousand devices, and
some ten events from each, counting anew each time would cost a cloud hours.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cloud.rollout.state import Device, Health


class Standing(NamedTuple):
    """What the rules count devices by."""

    wave: int | None
    health: Health
    online: bool
    excused: bool
    ahead: bool  # it runs a newer release than the cloud's newest
    aside: bool = False  # pinned, or in the penalty box

    @property
    def counts(self) -> bool:
        """Whether it has a place in a wave, and its failure is a failure."""
        return self.wave is not None and not self.excused

    @property
    def failed(self) -> bool:
        """Failed, or silent, which counts as failed."""
        return self.health in ("failed", "silent")

    @property
    def candidate(self) -> bool:
        """Whether a wave may take it. One that is ahead (the cloud lost releases) would refuse."""
        free = self.wave is None and not self.ahead and not self.aside
        return free and self.health in ("waiting", "committed")


Census = Counter[Standing]


def standing(device: Device, version: int) -> Standing:
    """Where a device stands in the rollout of release ``version``."""
    ahead = device.release > version
    return Standing(device.wave, device.health, device.online, device.excused, ahead, device.aside)


def take(devices: Iterable[Device], version: int) -> Census:
    """Count all."""
    return Counter(standing(device, version) for device in devices)


def recount(
    census: Census, known: Mapping[str, Device], changed: Iterable[Device], version: int
) -> Census:
    """The census after some of the known devices, or new ones, have become ``changed``."""
    after = census.copy()
    for device in changed:
        after[standing(device, version)] += 1
        if (before := known.get(device.name)) is not None:
            old = standing(before, version)
            after[old] -= 1
            if not after[old]:
                del after[old]
    return after
