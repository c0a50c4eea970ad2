"""The rules of a rollout: state and event in, new state and commands out. No I/O, no clock.

1. A release opens one wave after another. A wave takes devices that are online, in a stable order
   of their own for each release, until it is full; it waits for the first one as long as it takes.
2. A wave is through when enough of its devices, by count and by share, have committed and kept the
   release for the soak time. The last wave is through when no device is updating any more.
3. A device that was told and then says nothing until a deadline has failed. So has one whose commit
   names another student, and one that keeps falling back to another student after its commit.
4. The rollout halts when failures pass a count and a share, or when the open wave can no longer get
   through. A failing release therefore never leaves its first wave. It halts again when a person
   resumed it, nobody is left to try, and those that failed did not come to it in their time.
5. Devices that run the release's student already have committed; wave places go to them first.
6. A device that appears when the rollout is done is told at once; rule 4 goes on holding.
7. A newer release supersedes at any time. Aborting asks for a newer release with the content of the
   last one that was good, and a person may ask for that of any other: versions only grow.
8. Reports count once, and an older one than the latest known changes nothing.
9. A device begins only in a maintenance window, and only so many update at once. A wave is not
   through, and not lost, while devices with a place in it are held back by either.
10. A device that failed again and again, over all releases, goes to the penalty box, each time for
    longer: no wave takes it, none waits for it. What failed counts in its own rollout all the same,
    or a bad release would clear its own record.
11. A device that a person pinned stays at its release; no wave takes it.
12. Until the rollout is done, the guard halts a release that works and serves people worse
    (:mod:`cloud.rollout.guard`). What comes later is drift. A person who resumes has overruled it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from cloud.rollout import devices, waves
from cloud.rollout.events import (
    Abort,
    Begin,
    Bring,
    Command,
    Event,
    Gone,
    Order,
    Pause,
    Pin,
    Publish,
    Report,
    Restarted,
    Resume,
    Seen,
    SetTarget,
    Tick,
    Unbox,
    Unpin,
    Worse,
)
from cloud.rollout.state import Content, Device, Phase, Rollout, Wanted
from protos.errors import InvalidInputError

_LIVE = (Phase.RUNNING, Phase.DONE)
_OPEN = (*_LIVE, Phase.PAUSED)


def step(state: Rollout, event: Event, now: float) -> tuple[Rollout, list[Command]]:
    """Apply one event at time ``now`` (seconds since the epoch).

    Returns:
        The same state object when nothing changed, and the commands that follow from the change.

    Raises:
        InvalidInputError: an older release is to begin, or an order cannot be carried out.
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
    if (wanted := after.wanted()) is not None and wanted != state.wanted():
        commands.append(Publish(after.channel, wanted.content))
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
            device = state.devices.get(event.device, Device(event.device))
            after = state.with_devices(devices.seen(device, event, state, now))
        case Report():
            after = _report(state, event, now)
        case Gone():
            known = state.devices.get(event.device)
            after = state if known is None else state.with_devices(replace(known, online=False))
        case Tick():
            every = state.devices.values()
            after = state.with_devices(*(devices.passed(d, state.plan, now) for d in every))
        case Restarted():
            every = state.devices.values()
            after = state.with_devices(*(devices.unheard(d, now) for d in every))
        case Worse():
            after = _worse(state, event)
        case _:
            after = _order(state, event, now)
    return after


def _order(state: Rollout, event: Order, now: float) -> Rollout:
    """What a person orders; an order that does not fit the phase changes nothing."""
    match event:
        case Pause():
            return replace(state, phase=Phase.PAUSED) if state.phase in _LIVE else state
        case Resume() if state.phase is Phase.HALTED:
            every = [devices.resumed(d, now) for d in state.devices.values()]
            return replace(state.with_devices(*every), phase=Phase.RUNNING, reason="")
        case Resume():
            return replace(state, phase=Phase.RUNNING) if state.phase is Phase.PAUSED else state
        case Abort():
            live = state.phase in (*_OPEN, Phase.HALTED)
            return replace(state, phase=Phase.ABORTED, reason=event.reason) if live else state
        case Bring():
            return _bring(state, event)
        case Pin():
            device = devices.pinned(_known(state, event.device), event.release, state.version)
        case Unpin():
            device = replace(_known(state, event.device), pinned=None)
        case Unbox():
            device = replace(_known(state, event.device), boxed_until=0.0, strikes=0)
        case _:
            assert_never(event)
    return state.with_devices(device)


def _known(state: Rollout, name: str) -> Device:
    if (device := state.devices.get(name)) is None:
        msg = f"channel {state.channel!r} knows no device {name!r}: has it ever connected?"
        raise InvalidInputError(msg)
    return device


def _bring(state: Rollout, event: Bring) -> Rollout:
    newest = state.version - event.gives_up
    if not 1 <= event.content.version <= newest:
        msg = (
            f"channel {state.channel!r} is at release {state.version}: release "
            f"{event.content.version} is none that can be brought back"
        )
        raise InvalidInputError(msg)
    state = replace(state, ordered=Wanted(event.content, event.plan))
    return replace(state, phase=Phase.ABORTED, reason=event.reason) if event.gives_up else state


def _worse(state: Rollout, event: Worse) -> Rollout:
    late = state.complete or state.phase not in _OPEN
    if event.release != state.version or late or state.by_guard:
        return state
    return replace(state, phase=Phase.HALTED, reason=event.reason, by_guard=True)


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
    fresh = [devices.renewed(state.devices.get(name, Device(name))) for name in names]
    good = state.complete and state.phase not in (Phase.HALTED, Phase.ABORTED)
    ordered = state.ordered
    obeyed = ordered is not None and ordered.content.student == event.release.student
    return Rollout(
        channel=state.channel,
        version=event.release.version,
        student=event.release.student,
        plan=ordered.plan if ordered and obeyed and ordered.plan else event.plan,
        # A person's hold is on the channel: an automatic release must not lift it.
        phase=Phase.PAUSED if state.phase is Phase.PAUSED else Phase.RUNNING,
        began_at=now,
        stable=Content(state.version, state.student) if good else state.stable,
        ordered=None if obeyed else ordered,
        devices={
            d.name: devices.commit(d, now) if d.student == event.release.student else d
            for d in fresh
        },
        moved=tuple(names),
    )


def _report(state: Rollout, event: Report, now: float) -> Rollout:
    device = state.devices.get(event.device, Device(event.device))
    if event.sequence <= device.sequence:
        return state
    return state.with_devices(devices.reported(device, event, state, now))


def _progress(state: Rollout, now: float) -> Rollout:
    while state.phase in _OPEN:
        if state.phase is not Phase.PAUSED:
            state = waves.admit(state, now)
        if (reason := waves.why_halt(state, now)) is not None:
            return replace(state, phase=Phase.HALTED, reason=reason)
        if state.phase is not Phase.RUNNING or not waves.is_through(state, now):
            return state
        if state.wave == state.plan.last:
            return replace(state, phase=Phase.DONE, complete=True)
        state = replace(state, wave=state.wave + 1)
    return state
