"""What one device may use up: token buckets. Pure: the clock is passed in.

A bucket holds ``capacity`` and fills again over time. It bounds what comes at once and what comes
on average, in one number each. Buckets are in memory: a restart of the cloud fills them.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from protos.errors import InvalidInputError

DAY_S = 86400.0
_WORTH = 1 / 16
"""Who is refused is told to wait for this share of a bucket, not for its last drop: else each try
would be one more refusal."""
_KEPT = 10_000

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Limit:
    """A bucket's bounds.

    Attributes:
        capacity: what may be used at once.
        per_s: what comes back in a second.
    """

    capacity: float
    per_s: float

    def __post_init__(self) -> None:
        """Refuse a bucket that would never fill."""
        if not (self.capacity > 0 and self.per_s > 0):
            msg = f"a limit of {self.capacity} at {self.per_s} a second would let nothing pass"
            raise InvalidInputError(msg)


@dataclass(frozen=True)
class Bucket:
    """What was left at a moment (seconds of any clock that only goes on)."""

    left: float
    at: float

    def filled(self, limit: Limit, now: float) -> Bucket:
        """The bucket at ``now``.

        >>> Bucket(0.0, 100.0).filled(Limit(10, 0.5), 104.0)
        Bucket(left=2.0, at=104.0)
        """
        gained = max(0.0, now - self.at) * limit.per_s
        return Bucket(min(limit.capacity, self.left + gained), max(now, self.at))


def wait_s(bucket: Bucket, limit: Limit, cost: float) -> float:
    """Seconds until ``cost`` can be taken from a filled bucket; 0: now.

    More than the whole bucket can be taken when it is full: it is then in debt for a while.

    >>> wait_s(Bucket(4.0, 0.0), Limit(160, 1), 3)
    0.0
    >>> wait_s(Bucket(1.0, 0.0), Limit(160, 1), 3)
    9.0
    """
    cost = min(cost, limit.capacity)
    if bucket.left >= cost:
        return 0.0
    return (max(cost, limit.capacity * _WORTH) - bucket.left) / limit.per_s


class Buckets(Generic[K]):
    """One bucket for each key, full at first. For one thread."""

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self._buckets: dict[K, Bucket] = {}

    def wait_s(self, key: K, cost: float, *, now: float) -> float:
        """Seconds until ``cost`` may be taken; 0: now."""
        return wait_s(self._of(key, now), self._limit, cost)

    def take(self, key: K, cost: float, *, now: float) -> None:
        """Take it, even what is not there; a negative cost gives back."""
        bucket = self._of(key, now)
        left = min(self._limit.capacity, bucket.left - cost)
        self._buckets[key] = Bucket(left, bucket.at)
        if len(self._buckets) > _KEPT:
            self._forget(now)

    def _of(self, key: K, now: float) -> Bucket:
        bucket = self._buckets.get(key, Bucket(self._limit.capacity, now))
        return bucket.filled(self._limit, now)

    def _forget(self, now: float) -> None:
        """Drop buckets that are full: they are as good as new ones."""
        for key, bucket in list(self._buckets.items()):
            if bucket.filled(self._limit, now).left >= self._limit.capacity:
                del self._buckets[key]
