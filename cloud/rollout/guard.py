"""The guard against a release that works and serves people worse: an exact test. Pure.

What is compared is what the same devices gave before the release and after it, of three kinds: how
many of people's judgements were corrections, how many judged answers broke their schema, and how
many devices raised a drift alarm. Devices differ, and may speak up at different rates: so each is a
stratum of its own, and the numbers of its judgements are taken as given. Under the hypothesis that
the release is no worse, each device's bad items fall on "after" like balls drawn from an urn; the
sum over devices has an exact distribution, and the test is one-sided (Birch, "The detection of
partial association, I: the 2 x 2 case", J. R. Statist. Soc. B 26, 1964). With one device it is
Fisher's exact test, with one item before and after on each it is McNemar's.

Evidence comes one by one, and who looks often enough will see anything. So the first 8 items after
the release are tested, then the first 16, the first 32 and so on, and look ``k`` spends a share of
``2**-k`` of the error; the kinds share it equally. By Bonferroni's inequality a release that is no
worse is halted with at most the plan's ``guard_error``, however long it runs.

A device's alarm may come at any time after its commit, and is looked for at any time. That costs
nothing: the period before is never shorter than the one after, and alarms only grow in number.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cloud.rollout.state import Device, Rollout

FIRST_LOOK: Final = 8
"""Items after the release, at the first look; each later one has twice as many."""
MIN_DEVICES: Final = 2
"""Bad items must come from so many devices: one home may change its ways on any day."""

Table = tuple[int, int, int, int]
"""Of one device: bad items and all items after, bad items and all items before."""


@dataclass(frozen=True)
class Item:
    """One thing that was seen of a device: a judged answer, or the device itself."""

    device: str
    bad: bool


@dataclass(frozen=True)
class Signal:
    """One kind of evidence. ``after`` is in the order in which it came.

    ``says`` completes "... of N on M devices".
    """

    says: str
    before: tuple[Item, ...]
    after: tuple[Item, ...]


@dataclass(frozen=True)
class Judgement:
    """A demonstration as the guard sees it; ``at`` is when the cloud stored it."""

    device: str
    student: str
    at: float
    corrected: bool
    schema_broken: bool


@dataclass(frozen=True)
class Alarm:
    """A drift alarm on a student."""

    device: str
    student: str
    at: float


def those_that_took(state: Rollout) -> list[Device]:
    """The devices that took the release in their wave, in the order in which they did."""
    took = (d for d in state.devices.values() if d.wave is not None and d.committed_at)
    return sorted(took, key=lambda d: (d.committed_at, d.name))


def evidence(
    state: Rollout, judgements: Iterable[Judgement], alarms: Iterable[Alarm]
) -> list[Signal]:
    """What is known of the devices that took the release, before and after.

    Args:
        state: the rollout.
        judgements: in the order in which they were stored.
        alarms: in any order.
    """
    took = those_that_took(state)
    names = {d.name for d in took}
    begin = state.began_at - state.plan.guard_before_s
    before: list[Judgement] = []
    after: list[Judgement] = []
    for judged in judgements:
        if judged.device in names and judged.at >= begin:
            if judged.student != state.student:
                before.append(judged)
            elif judged.at >= state.began_at:
                after.append(judged)
    old: set[str] = set()
    new: set[str] = set()
    for alarm in alarms:
        if alarm.at >= begin and alarm.student != state.student:
            old.add(alarm.device)
        elif alarm.at >= state.began_at:
            new.add(alarm.device)
    return [
        Signal(
            "judged answers were corrected",
            tuple(Item(j.device, j.corrected) for j in before),
            tuple(Item(j.device, j.corrected) for j in after),
        ),
        Signal(
            "judged answers broke their schema",
            tuple(Item(j.device, j.schema_broken) for j in before),
            tuple(Item(j.device, j.schema_broken) for j in after),
        ),
        Signal(
            "devices raised a drift alarm",
            tuple(Item(d.name, d.name in old) for d in took),
            tuple(Item(d.name, d.name in new) for d in took),
        ),
    ]


def judge(signals: Sequence[Signal], *, error: float, margin: float) -> str | None:
    """Why the release is worse, if it is.

    Args:
        signals: from :func:`evidence`.
        error: probability of halting a release that is no worse, at most; 0 halts none.
        margin: share by which it must be worse, besides being so beyond chance.
    """
    for signal in signals:
        tables = _Tables(signal.before)
        look, size = 1, FIRST_LOOK
        while len(signal.after) >= size:
            tables.take(signal.after[tables.taken : size])
            spent = error / len(signals) / 2.0**look
            if (reason := tables.worse(signal.says, spent, margin)) is not None:
                return reason
            look, size = look + 1, 2 * size
    return None


def p_value(tables: Iterable[Table]) -> float:
    """Probability of so many bad items after, or more, if the release is no worse.

    >>> round(p_value([(7, 8, 2, 10)]), 5)  # Fisher's exact test
    0.00761
    >>> round(p_value([(1, 1, 0, 1)] * 8), 8)  # McNemar's: 2 ** -8
    0.00390625
    """
    seen = 0
    chances = np.ones(1)
    for bad_after, after, bad_before, before in tables:
        bad = bad_after + bad_before
        least, most = max(0, bad - before), min(bad, after)
        logs = np.array(
            [_log_choose(after, x) + _log_choose(before, bad - x) for x in range(least, most + 1)]
        )
        share = np.exp(logs - logs.max())
        chances = np.convolve(chances, share / share.sum())
        seen += bad_after - least
    return float(min(1.0, chances[seen:].sum()))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


class _Tables:
    """Counts by device, as items after the release are taken one by one."""

    def __init__(self, before: Iterable[Item]) -> None:
        self._before: dict[str, Counter[bool]] = defaultdict(Counter)
        for item in before:
            self._before[item.device][item.bad] += 1
        self._after: dict[str, Counter[bool]] = defaultdict(Counter)
        self.taken = 0

    def take(self, items: Sequence[Item]) -> None:
        """Count these as well."""
        for item in items:
            self._after[item.device][item.bad] += 1
        self.taken += len(items)

    def worse(self, says: str, error: float, margin: float) -> str | None:
        """Why what was taken so far is worse than before, if it is."""
        # A device of which nothing is known from before says nothing about better or worse.
        tables = [
            (n[True], n.total(), self._before[device][True], self._before[device].total())
            for device, n in self._after.items()
            if device in self._before
        ]
        bad, items = sum(t[0] for t in tables), sum(t[1] for t in tables)
        if sum(bool(t[0]) for t in tables) < MIN_DEVICES:
            return None
        usual = sum(n * bad_before / before for _, n, bad_before, before in tables)
        if bad - usual < margin * items or (p := p_value(tables)) > error:
            return None
        return (
            f"worse than before it: {bad} of {items} {says}, on {len(tables)} devices, where "
            f"{usual:.1f} would be usual for them (p = {p:.2g}, and {error:.2g} is enough here)"
        )
