"""Who may connect now: a picture of the register in memory, and pure judgements on it.

Calls and messages come far more often than the register changes, so they ask the picture. It is
taken anew some seconds after any process has changed the register (:meth:`RosterKeeper.refresh`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protos.errors import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cloud.identity.registry import Certified, Registry


@dataclass(frozen=True)
class Roster:
    """The certificates of each device, those in force first."""

    by_device: Mapping[str, tuple[Certified, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, certified: Sequence[Certified]) -> Roster:
        """Make one of every certificate that has not expired."""
        grouped: dict[str, list[Certified]] = {}
        for each in sorted(certified, key=lambda c: (c.revoked_ms or 0, -c.not_after_ms)):
            grouped.setdefault(each.device, []).append(each)
        return cls({device: tuple(each) for device, each in grouped.items()})

    def check(self, device: str, serial: int, *, now: float) -> Certified:
        """The certificate that a device has shown, if it is in force.

        Raises:
            RefusedError: it is not, and why.
        """
        for each in self.by_device.get(device, ()):
            if each.serial == serial:
                return _in_force(each, now)
        msg = f"the certificate that device {device} showed is not on the register: enrol it again"
        raise RefusedError(msg)

    def check_name(self, device: str, channel: str, *, now: float) -> None:
        """See that a device has a certificate in force, where a broker has seen which.

        Raises:
            RefusedError: it has none, or belongs to another channel.
        """
        known = self.by_device.get(device, ())
        if not known:
            msg = f"device {device} has no certificate in force: enrol it"
            raise RefusedError(msg)
        check_channel(_in_force(known[0], now), channel)

    def in_force(self, *, now: float) -> int:
        """How many devices may connect."""
        return sum(any(c.in_force(now) for c in each) for each in self.by_device.values())


def check_channel(certified: Certified, channel: str) -> None:
    """Raise :class:`RefusedError` unless a device belongs to ``channel``."""
    if certified.channel != channel:
        msg = f"device {certified.device} belongs to channel {certified.channel}, not {channel}"
        raise RefusedError(msg)


def _in_force(certified: Certified, now: float) -> Certified:
    if certified.revoked_ms is not None:
        msg = f"the certificate of device {certified.device} was revoked ({certified.reason})"
        raise RefusedError(msg)
    if certified.not_after_ms <= now * 1000:
        msg = f"the certificate of device {certified.device} has expired: enrol it again"
        raise RefusedError(msg)
    return certified


class RosterKeeper:
    """Keeps a roster that is at most one :meth:`refresh` behind the register."""

    def __init__(self, registry: Registry, *, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._clock = clock
        self._revision = -1
        self._refreshing = threading.Lock()
        self.roster = Roster()

    def refresh(self) -> bool:
        """Look at the register; whether anything has changed.

        Raises:
            StorageError: it cannot be read; the roster stays as it was.
        """
        with self._refreshing:
            revision = self._registry.revision()
            if revision == self._revision:
                return False
            self.roster = Roster.of(self._registry.certified())
            self._revision = revision
            return True

    def check(self, device: str, serial: int) -> Certified:
        """See :meth:`Roster.check`."""
        return self.roster.check(device, serial, now=self._clock())

    def check_name(self, channel: str, device: str) -> None:
        """See :meth:`Roster.check_name`."""
        self.roster.check_name(device, channel, now=self._clock())
