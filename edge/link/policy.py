"""When to send what: pure decisions of the outbox's sender.

The cloud may be slow, down, or gone while the broker is up. So few items are in flight at a time,
and an item without an answer is sent again. Once an answer is overdue the cloud counts as silent:
from then on one item at a time goes out as a probe, more and more rarely, until any answer opens
the window again. The probe is the item that was sent least often, so that one item to which the
cloud has no answer cannot hold up the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from random import Random

_MAX_DOUBLINGS = 32
_SILENCE_BASE_S = 1.0


def full_jitter(attempt: int, *, base_s: float, cap_s: float, random: Random) -> float:
    """Seconds to wait before retry number ``attempt`` (from 0): uniform below a doubling bound.

    Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    >>> import random
    >>> 0 <= full_jitter(3, base_s=1, cap_s=60, random=random.Random(0)) <= 8
    True
    """
    return random.uniform(0, min(cap_s, base_s * 2.0 ** min(attempt, _MAX_DOUBLINGS)))


@dataclass(frozen=True, kw_only=True)
class SendPolicy:
    """Bounds of the sender.

    Attributes:
        window: items in flight at most while the cloud answers.
        ack_timeout_s: seconds until an answer is overdue.
        silence_cap_s: seconds added to it at most while the cloud is silent.
    """

    window: int = 64
    ack_timeout_s: float = 5.0
    silence_cap_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Flight:
    """What is under way on one connection.

    Attributes:
        overdue_at: for each item in flight, when its answer will be overdue (monotonic seconds).
        sends: how often each waiting item was sent.
        silent: timeouts since the cloud last answered; 0 while it answers.
    """

    overdue_at: Mapping[str, float] = field(default_factory=dict)
    sends: Mapping[str, int] = field(default_factory=dict)
    silent: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to send now, the flight after that, and when to ask again (None: when woken)."""

    send: tuple[str, ...]
    flight: Flight
    again_at: float | None


def plan(
    policy: SendPolicy, flight: Flight, waiting: Sequence[str], *, now: float, random: Random
) -> Plan:
    """Choose what to send now.

    Args:
        policy: the bounds.
        flight: what is under way.
        waiting: ids of items without an answer, oldest first: at least twice ``policy.window`` of
            them where there are as many.
        now: monotonic seconds.
        random: for the jitter.
    """
    known = set(waiting)
    under_way = {i: at for i, at in flight.overdue_at.items() if i in known and at > now}
    sends = {i: n for i, n in flight.sends.items() if i in known}
    missed = any(i in known and at <= now for i, at in flight.overdue_at.items())
    silent = flight.silent + 1 if missed else flight.silent
    room = max(0, (1 if silent else policy.window) - len(under_way))
    # sorted() is stable: among items sent equally often the oldest goes first.
    idle = sorted((i for i in waiting if i not in under_way), key=lambda i: sends.get(i, 0))
    chosen = tuple(idle[:room])
    for i in chosen:
        jitter = full_jitter(
            silent, base_s=_SILENCE_BASE_S, cap_s=policy.silence_cap_s, random=random
        )
        under_way[i] = now + policy.ack_timeout_s + (jitter if silent else 0.0)
        sends[i] = sends.get(i, 0) + 1
    return Plan(
        send=chosen,
        flight=Flight(overdue_at=under_way, sends=sends, silent=silent),
        again_at=min(under_way.values(), default=None),
    )


def answered(flight: Flight, ids: Collection[str]) -> Flight:
    """The flight after the cloud has answered for ``ids``."""
    return replace(
        flight,
        overdue_at={i: at for i, at in flight.overdue_at.items() if i not in ids},
        sends={i: n for i, n in flight.sends.items() if i not in ids},
        silent=0,
    )


def reconnected(flight: Flight) -> Flight:
    """The flight on a new connection: what was under way may be lost, so it waits again."""
    return replace(flight, overdue_at={}, silent=0)
