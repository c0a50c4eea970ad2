"""The rules of a rollout: state and event in, new state and commands out. No I/O, no clock.

1. A release opens one wave after another. A wave takes devices that are online, in a stable order
   of their own for each release, until it is full; it waits for the first one as long as it takes.
2. A wave is through when enough of its devices, by count and by share, have committed and kept the
   release for the soak time. The last wave is through when no device is updating any more.
3. A device that was told and then says nothing until a deadline has failed. So has one whose commit
   names another student, one that raises a drift alarm before the rollout is done, and one that
   keeps falling back to another student after its commit.
4. The rollout halts when failures pass a count and a share, or when the open wave can no longer get
   through. A failing release therefore never leaves its first wave. It halts again when a person
   resumed it, nobody is left to try, and those that failed did not come to it in their time.
5. Devices that run the release's student already have committed; wave places go to them first.
6. A device that appears when the rollout is done is told at once; rule 4 goes on holding.
7. A newer release supersedes at any time. Aborting asks for a newer release with the content of the
   last one that was good: versions only grow.
8. Reports count once, and an older one than the latest known changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cloud.rollout.census import standing
from cloud.rollout.events import (
    Abort,
    Alarm,
    Begin,
    Command,
    Event,
    Gone,
    Outcome,
    Pause,
    Report,
    Restarted,
    Resume,
    RollBack,
    Seen,
    SetTarget,
    Tick,
)
from cloud.rollout.state import Content, Device, Health, Phase, Plan, Rollout, ceil_share, order
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud.rollout.census import Standing


def step(state: Rollout, event: Event, now: float) -> tuple[Rollout, list[Command]]:
    """Apply one event at time ``now`` (seconds since the epoch).

    Returns:
        The same state object when nothing changed, and the commands that follow from the change.

    Raises:
        InvalidInputError: a rollout of an older release than the present one is to begin.
    """
    still = replace(state, moved=()) if state.moved else state
    after = _progress(_apply(still, event, now), now)
    if after is still or after == state:
        return state, []
    everyone = (after.version, after.phase, after.stable) != (
        state.version,
        state.phase,
        state.stable,
    )
    commands: list[Command] = [
        SetTarget(name, after.target(name))
        for name in (after.devices if everyone else after.moved)
        if after.target(name) != state.target(name)
    ]
    if state.phase is not Phase.ABORTED and (content := after.rollback()) is not None:
        commands.append(RollBack(after.channel, content))
    return after, commands


def is_stale(state: Rollout, report: Report) -> bool:
    """Whether a newer report of the same device is known."""
    device = state.devices.get(report.device)
    return device is not None and report.sequence < device.sequence


def _apply(state: Rollout, event: Event, now: float) -> Rollout:
    match event:
        case Begin():
            after = _begin(state, event, now)
        case Seen():
            after = _seen(state, event, now)
        case Report():
            after = _report(state, event, now)
        case Gone():
            device = state.devices.get(event.device)
            after = state if device is None else state.with_devices(replace(device, online=False))
        case Alarm():
            after = _alarm(state, event)
        case Tick():
            after = state.with_devices(
                *(_expire(d, state.plan, now) for d in state.devices.values())
            )
        case Restarted():
            after = state.with_devices(*(_unheard(d, now) for d in state.devices.values()))
        case _:
            after = _order(state, event, now)
    return after


def _order(state: Rollout, event: Pause | Resume | Abort, now: float) -> Rollout:
    live = state.phase in (Phase.RUNNING, Phase.DONE)
    match event:
        case Pause() if live:
            return replace(state, phase=Phase.PAUSED)
        case Resume() if state.phase is Phase.PAUSED:
            return replace(state, phase=Phase.RUNNING)
        case Resume() if state.phase is Phase.HALTED:
            excused = (
                replace(d, excused=True, told_at=now) for d in state.devices.values() if d.failed
            )
            return replace(state.with_devices(*excused), phase=Phase.RUNNING, reason="")
        case Abort() if live or state.phase in (Phase.PAUSED, Phase.HALTED):
            return replace(state, phase=Phase.ABORTED, reason=event.reason)
        case _:
            return state


def _begin(state: Rollout, event: Begin, now: float) -> Rollout:
    if event.release == Content(state.version, state.student):
        return state
    if event.release.version <= state.version:
        msg = (
            f"channel {state.channel!r} is at release {state.version}; release "
            f"{event.release.version} cannot begin: publish a newer one with its content"
        )
        raise InvalidInputError(msg)
    names = dict.fromkeys([*state.devices, *event.devices])
    kept = [state.devices.get(name, Device(name)) for name in names]
    fresh = [
        Device(
            d.name,
            online=d.online,
            student=d.student,
            release=d.release,
            sequence=d.sequence,
            heard_at=d.heard_at,
        )
        for d in kept
    ]
    good = state.complete and state.phase not in (Phase.HALTED, Phase.ABORTED)
    return Rollout(
        channel=state.channel,
        version=event.release.version,
        student=event.release.student,
        plan=event.plan,
        # A person's hold is on the channel: an automatic release must not lift it.
        phase=Phase.PAUSED if state.phase is Phase.PAUSED else Phase.RUNNING,
        began_at=now,
        stable=Content(state.version, state.student) if good else state.stable,
        devices={
            d.name: _commit(d, now) if d.student == event.release.student else d for d in fresh
        },
        moved=tuple(names),
    )


def _seen(state: Rollout, event: Seen, now: float) -> Rollout:
    device = replace(
        state.devices.get(event.device, Device(event.device)),
        online=True,
        student=event.student,
        release=event.release,
        heard_at=now,
    )
    if state.version and event.student == state.student:
        if device.health is not Health.COMMITTED:
            device = _commit(device, now)
    elif device.health is Health.COMMITTED:
        device = _fell_back(device, state.plan, now)
    return state.with_devices(device)


def _commit(device: Device, now: float) -> Device:
    # One that was excused gave its place away: it counts again in the next wave with a free place.
    wave = None if device.excused else device.wave
    return replace(
        device, health=Health.COMMITTED, committed_at=now, wave=wave, excused=False, reason=""
    )


def _fell_back(device: Device, plan: Plan, now: float) -> Device:
    flaps = device.flaps + 1
    device = replace(device, flaps=flaps)
    if flaps >= plan.max_flaps:
        reason = f"came back with another student {flaps} times after its commit"
        return replace(device, health=Health.FAILED, reason=reason)
    if device.wave is None:
        return replace(device, health=Health.WAITING)
    return replace(device, health=Health.UPDATING, told_at=now)


def _report(state: Rollout, event: Report, now: float) -> Rollout:
    device = state.devices.get(event.device, Device(event.device))
    if event.sequence <= device.sequence:
        return state
    device = replace(device, sequence=event.sequence, heard_at=now, student=event.student)
    if event.outcome is Outcome.COMMITTED:
        device = replace(device, release=event.release)
    if state.version == 0 or event.release != state.version:
        return state.with_devices(device)
    if event.outcome is Outcome.FAILED:
        device = replace(device, health=Health.FAILED, reason=event.detail)
    elif event.outcome is Outcome.COMMITTED and event.student != state.student:
        reason = f"committed, but runs student {event.student[:12]}"
        device = replace(device, health=Health.FAILED, reason=reason)
    elif event.outcome is Outcome.COMMITTED and device.health is not Health.COMMITTED:
        device = _commit(device, now)
    return state.with_devices(device)


def _alarm(state: Rollout, event: Alarm) -> Rollout:
    device = state.devices.get(event.device)
    if (
        device is None
        or state.complete
        or device.health is not Health.COMMITTED
        or event.student != state.student
    ):
        return state
    return state.with_devices(
        replace(device, health=Health.FAILED, reason="drift alarm on the release")
    )


def _unheard(device: Device, now: float) -> Device:
    if device.health is not Health.UPDATING:
        return replace(device, online=False)
    return replace(device, online=False, told_at=now, heard_at=now)


def _expire(device: Device, plan: Plan, now: float) -> Device:
    if device.health is not Health.UPDATING:
        return device
    if now - device.heard_at > plan.silence_s:
        reason = f"told, then silent for {plan.silence_s:g} s"
    elif now - device.told_at > plan.total_s:
        reason = f"not done within {plan.total_s:g} s"
    else:
        return device
    return replace(device, health=Health.SILENT, reason=reason)


def _progress(state: Rollout, now: float) -> Rollout:
    while state.phase in (Phase.RUNNING, Phase.PAUSED, Phase.DONE):
        if state.phase is not Phase.PAUSED:
            state = _admit(state, now)
        if (reason := _why_halt(state, now)) is not None:
            return replace(state, phase=Phase.HALTED, reason=reason)
        if state.phase is not Phase.RUNNING or not _is_through(state, now):
            return state
        if state.wave == state.plan.last:
            return replace(state, phase=Phase.DONE, complete=True)
        state = replace(state, wave=state.wave + 1)
    return state


def _admit(state: Rollout, now: float) -> Rollout:
    """Give the open wave's free places to devices that are online."""
    room = state.plan.capacity(state.wave, len(state.devices)) - _count(state, _in_wave(state))
    if room <= 0 or not _count(state, lambda s: s.online and s.candidate):
        return state
    candidates = [
        d for d in state.devices.values() if d.online and standing(d, state.version).candidate
    ]
    candidates.sort(
        key=lambda d: (
            d.health is not Health.COMMITTED,
            order(state.channel, state.version, d.name),
        )
    )
    admitted = candidates if room > len(candidates) else candidates[: int(room)]
    return state.with_devices(
        *(
            replace(d, wave=state.wave)
            if d.health is Health.COMMITTED
            else replace(d, wave=state.wave, health=Health.UPDATING, told_at=now, heard_at=now)
            for d in admitted
        ),
    )


def _count(state: Rollout, which: Callable[[Standing], bool]) -> int:
    return sum(n for s, n in state.census.items() if which(s))


def _in_wave(state: Rollout) -> Callable[[Standing], bool]:
    """Who counts in the open wave."""
    return lambda s: s.counts and s.wave == state.wave


def _needed(state: Rollout, members: int) -> int:
    """How many of the open wave's members must commit."""
    plan = state.plan
    return max(1, min(plan.min_committed, members), ceil_share(plan.min_healthy_share, members))


def _why_halt(state: Rollout, now: float) -> str | None:
    plan = state.plan
    failed = _count(state, lambda s: s.counts and s.failed)
    if failed:
        settled = failed + _count(state, lambda s: s.counts and s.health is Health.COMMITTED)
        if failed >= plan.halt_failures and failed >= plan.halt_share * settled:
            return f"{failed} of {settled} devices failed, {_example(state, lambda s: s.counts)}"
        in_wave = _in_wave(state)
        members = _count(state, in_wave)
        failed = _count(state, lambda s: in_wave(s) and s.failed)
        if failed and not state.complete and members - failed < _needed(state, members):
            return (
                f"wave {state.wave} cannot get through: {failed} of its {members} devices failed, "
                f"{_example(state, in_wave)}"
            )
    return _why_nobody(state, now)


def _why_nobody(state: Rollout, now: float) -> str | None:
    """After a person resumed: whether all failed already, and had time enough to come to it yet."""
    if state.wave > 0 or state.complete:
        return None
    in_wave = _in_wave(state)
    if _count(state, lambda s: in_wave(s) or s.candidate):
        return None
    tried = [d for d in state.devices.values() if d.failed]
    if not tried or any(now - d.told_at <= state.plan.total_s for d in tried):
        return None
    failed = _example(state, lambda _: True)
    return f"nobody is left to try: all {len(tried)} devices failed, {failed}"


def _is_through(state: Rollout, now: float) -> bool:
    in_wave = _in_wave(state)
    members = _count(state, in_wave)
    if state.wave == state.plan.last:
        if _count(state, lambda s: s.counts and s.health is not Health.COMMITTED and not s.failed):
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
        return not _count(state, lambda s: s.candidate and s.health is Health.WAITING)
    return _is_proven(state, members, now)


def _is_proven(state: Rollout, members: int, now: float) -> bool:
    """Whether enough of the open wave's devices committed, and kept the release."""
    in_wave, needed = _in_wave(state), _needed(state, members)
    if _count(state, lambda s: in_wave(s) and s.health is Health.COMMITTED) < needed:
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
