"""The arithmetic of waves: who gets a place, when a wave is through, when a rollout halts. Pure."""

from __future__ import annotations

import heapq
from dataclasses import replace
from typing import TYPE_CHECKING

from cloud.rollout.census import standing
from cloud.rollout.state import Device, Health, Rollout, order

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud.rollout.census import Standing


def admit(state: Rollout, now: float) -> Rollout:
    """Give the open wave's free places to devices that are online.

    Those that run the release already come first. The others begin to update, so they need an open
    maintenance window, and no more do so at once than the plan allows.
    """
    plan = state.plan
    room = _room(state)
    ready = count(state, lambda s: s.online and s.candidate and s.health is Health.COMMITTED)
    if room <= 0 or not (ready or _waiting(state)):
        return state
    free = 0.0
    if plan.may_begin(now):
        free = plan.may_join(count(state, lambda s: s.health is Health.UPDATING))
    places = min(room, ready + free)
    if places <= 0:
        return state
    candidates = [
        d for d in state.devices.values() if d.online and standing(d, state.version).candidate
    ]
    admitted = heapq.nsmallest(
        int(min(places, len(candidates))),
        candidates,
        key=lambda d: (
            d.health is not Health.COMMITTED,
            order(state.channel, state.version, d.name),
        ),
    )
    return state.with_devices(
        *(
            replace(d, wave=state.wave)
            if d.health is Health.COMMITTED
            else replace(d, wave=state.wave, health=Health.UPDATING, told_at=now, heard_at=now)
            for d in admitted
        ),
    )


def why_halt(state: Rollout, now: float) -> str | None:
    """Why the rollout must not go on, if it must not."""
    plan = state.plan
    failed = count(state, lambda s: s.counts and s.failed)
    if failed:
        settled = failed + count(state, lambda s: s.counts and s.health is Health.COMMITTED)
        if failed >= plan.halt_failures and failed >= plan.halt_share * settled:
            return f"{failed} of {settled} devices failed, {_example(state, lambda s: s.counts)}"
        in_wave = _in_wave(state)
        # Those that a window or a limit holds back may still make up for the ones that failed.
        members = count(state, in_wave) + int(min(_room(state), _waiting(state)))
        failed = count(state, lambda s: in_wave(s) and s.failed)
        if failed and not state.complete and members - failed < plan.needed(members):
            return (
                f"wave {state.wave} cannot get through: {failed} of its {members} devices failed, "
                f"{_example(state, in_wave)}"
            )
    return _why_nobody(state, now)


def is_through(state: Rollout, now: float) -> bool:
    """Whether the open wave is through: the next one may open."""
    in_wave = _in_wave(state)
    members = count(state, in_wave)
    if _waiting(state) and _room(state) > 0:
        return False  # a window or a limit holds devices back that have a place in this wave
    if state.wave == state.plan.last:
        if count(state, lambda s: s.counts and s.health is not Health.COMMITTED and not s.failed):
            return False
        # A plan of one wave must not call a release good that nobody has taken.
        if state.wave == 0 and not state.complete and not _is_proven(state, members, now):
            return False
        return all(
            d.failed or _has_soaked(d, state, now)
            for d in state.devices.values()
            if d.wave is not None and not d.excused
        )
    if not members and state.wave > 0:
        # Nobody is left to wait for; else the wave waits for its first device to come online.
        return not count(state, lambda s: s.candidate and s.health is Health.WAITING)
    return _is_proven(state, members, now)


def count(state: Rollout, which: Callable[[Standing], bool]) -> int:
    """How many devices stand so."""
    return sum(n for s, n in state.census.items() if which(s))


def _in_wave(state: Rollout) -> Callable[[Standing], bool]:
    """Who counts in the open wave."""
    return lambda s: s.counts and s.wave == state.wave


def _room(state: Rollout) -> float:
    """Free places in the open wave."""
    return state.plan.capacity(state.wave, len(state.devices)) - count(state, _in_wave(state))


def _waiting(state: Rollout) -> int:
    """How many devices would begin at once if they got a place."""
    return count(state, lambda s: s.online and s.candidate and s.health is Health.WAITING)


def _why_nobody(state: Rollout, now: float) -> str | None:
    """After a person resumed: whether all failed already, and had time enough to come to it yet."""
    if state.wave > 0 or state.complete:
        return None
    in_wave = _in_wave(state)
    if count(state, lambda s: in_wave(s) or s.candidate):
        return None
    tried = [d for d in state.devices.values() if d.failed]
    if not tried or any(now - d.told_at <= state.plan.total_s for d in tried):
        return None
    if any(_comes_back(d) for d in state.devices.values()):
        return None
    failed = _example(state, lambda _: True)
    return f"nobody is left to try: all {len(tried)} devices failed, {failed}"


def _comes_back(device: Device) -> bool:
    """Whether it waits in the penalty box, to be tried later."""
    waits = device.health is Health.WAITING and device.wave is None
    return waits and device.boxed_until > 0.0 and device.pinned is None


def _is_proven(state: Rollout, members: int, now: float) -> bool:
    """Whether enough of the open wave's devices committed, and kept the release."""
    in_wave, needed = _in_wave(state), state.plan.needed(members)
    if count(state, lambda s: in_wave(s) and s.health is Health.COMMITTED) < needed:
        return False
    soaked = sum(
        d.wave == state.wave
        and not d.excused
        and d.health is Health.COMMITTED
        and _has_soaked(d, state, now)
        for d in state.devices.values()
    )
    return soaked >= needed


def _has_soaked(device: Device, state: Rollout, now: float) -> bool:
    return now - max(device.committed_at, state.began_at) >= state.plan.soak_s


def _example(state: Rollout, which: Callable[[Standing], bool]) -> str:
    failed = (d for d in state.devices.values() if d.failed)
    one = next(d for d in failed if which(standing(d, state.version)))
    return f"for instance {one.name}: {one.reason or 'no reason given'}"
