"""What one device may give: messages and bytes of evidence, in token buckets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from cloud.evidence.messages import Reason, Refused
from cloud.quota import DAY_S, Buckets, Limit
from protos.errors import InvalidInputError

_MB = 1024 * 1024


class Sender(NamedTuple):
    """A device of a channel."""

    channel: str
    device: str


@dataclass(frozen=True, kw_only=True)
class EvidenceLimits:
    """Bounds of one device's demonstrations and drift reports together.

    A device that comes back after a week has a week to tell: so much at once is fine.

    Attributes:
        messages: in one go, and a second on average.
        bytes: likewise; what comes back in a second adds up to the same amount a day.
    """

    messages: Limit = field(default_factory=lambda: Limit(2_000, 1.0))
    bytes: Limit = field(default_factory=lambda: Limit(64 * _MB, 64 * _MB / DAY_S))

    @classmethod
    def of(cls, *, burst: int, per_minute: float, mb_per_day: float) -> EvidenceLimits:
        """As a person says it.

        Raises:
            InvalidInputError: nothing could ever pass.
        """
        if burst < 1 or per_minute <= 0 or mb_per_day <= 0:
            msg = "quotas must let something pass: give numbers above 0"
            raise InvalidInputError(msg)
        daily = mb_per_day * _MB
        return cls(messages=Limit(burst, per_minute / 60), bytes=Limit(daily, daily / DAY_S))


class EvidenceQuota:
    """Counts what each device gives. For one thread."""

    def __init__(self, limits: EvidenceLimits) -> None:
        self._limits = limits
        self._messages = Buckets[Sender](limits.messages)
        self._bytes = Buckets[Sender](limits.bytes)

    def take(self, sender: Sender, item_id: str, size: int, *, now: float) -> Refused | None:
        """Count a message of ``size`` bytes, or say why it must wait.

        Args:
            sender: who gives it.
            item_id: for the answer.
            size: bytes.
            now: monotonic seconds.
        """
        for buckets, cost, what in (
            (self._messages, 1, self._messages_said),
            (self._bytes, size, self._bytes_said),
        ):
            wait = buckets.wait_s(sender, cost, now=now)
            if wait:
                detail = f"this device is over its limit of {what()}: again in {wait:.0f} s"
                return Refused(Reason.QUOTA, detail, item_id, wait)
        self._messages.take(sender, 1, now=now)
        self._bytes.take(sender, size, now=now)
        return None

    def give_back(self, sender: Sender, size: int, *, now: float) -> None:
        """It was not stored, or was stored before."""
        self._messages.take(sender, -1, now=now)
        self._bytes.take(sender, -size, now=now)

    def _messages_said(self) -> str:
        limit = self._limits.messages
        return f"{limit.capacity:.0f} messages at once and {limit.per_s * 60:.0f} a minute"

    def _bytes_said(self) -> str:
        return f"{self._limits.bytes.capacity / _MB:.1f} MiB a day"
