"""What an event does to one device: pure functions from a device to a device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cloud.rollout.events import Outcome, Report, Seen
from cloud.rollout.state import Device, Health
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from cloud.rollout.plan import Plan
    from cloud.rollout.state import Rollout


def renewed(device: Device) -> Device:
    """As a newer release finds it. A clean update makes up for the failures before it."""
    clean = device.health is Health.COMMITTED and not device.flaps
    return Device(
        device.name,
        online=device.online,
        student=device.student,
        release=device.release,
        sequence=device.sequence,
        heard_at=device.heard_at,
        pinned=device.pinned,
        strikes=0 if clean else device.strikes,
        boxed_until=device.boxed_until,
    )


def commit(device: Device, now: float) -> Device:
    """It runs the release."""
    # One that was excused gave its place away: it counts again in the next wave with a free place.
    wave = None if device.excused else device.wave
    return replace(
        device, health=Health.COMMITTED, committed_at=now, wave=wave, excused=False, reason=""
    )


def seen(device: Device, event: Seen, state: Rollout, now: float) -> Device:
    """It opened its first watch stream, and says what it runs."""
    device = replace(
        device, online=True, student=event.student, release=event.release, heard_at=now
    )
    if state.version and event.student == state.student:
        return device if device.health is Health.COMMITTED else commit(device, now)
    return _fell_back(device, state.plan, now) if device.health is Health.COMMITTED else device


def reported(device: Device, event: Report, state: Rollout, now: float) -> Device:
    """It says how an update goes; the report is newer than those known."""
    device = replace(device, sequence=event.sequence, heard_at=now, student=event.student)
    committed = event.outcome is Outcome.COMMITTED
    if committed:
        device = replace(device, release=event.release)
    if state.version == 0 or event.release != state.version:
        return device
    if event.outcome is Outcome.FAILED:
        return _fail(device, state.plan, now, event.detail)
    if committed and event.student != state.student:
        reason = f"committed, but runs student {event.student[:12]}"
        return _fail(device, state.plan, now, reason)
    if committed and device.health is not Health.COMMITTED:
        return commit(device, now)
    return device


def passed(device: Device, plan: Plan, now: float) -> Device:
    """Time has passed: it may have been silent for too long, or be free of the penalty box."""
    if 0.0 < device.boxed_until <= now:
        device = replace(device, boxed_until=0.0)
    if device.health is not Health.UPDATING:
        return device
    if now - device.heard_at > plan.silence_s:
        reason = f"told, then silent for {plan.silence_s:g} s"
    elif now - device.told_at > plan.total_s:
        reason = f"not done within {plan.total_s:g} s"
    else:
        return device
    return _fail(device, plan, now, reason, Health.SILENT)


def unheard(device: Device, now: float) -> Device:
    """The cloud was away: what it did not hear was not silence."""
    if device.health is not Health.UPDATING:
        return replace(device, online=False)
    return replace(device, online=False, told_at=now, heard_at=now)


def resumed(device: Device, now: float) -> Device:
    """A person resumed a halted rollout: failures count no more, the others wait for their turn.

    What was halted in the middle begins anew, so that windows and limits hold for it as well.
    """
    if device.failed:
        return replace(device, excused=True, told_at=now)
    if device.health is Health.UPDATING:
        return replace(device, health=Health.WAITING, wave=None)
    return device


def pinned(device: Device, release: int, newest: int) -> Device:
    """A person holds it at a release.

    Raises:
        InvalidInputError: there is no such release, or the device would have to go back.
    """
    if not 1 <= release <= newest:
        msg = f"there is no release {release}: the newest is {newest}"
        raise InvalidInputError(msg)
    if release < device.release:
        msg = (
            f"device {device.name} runs release {device.release}, and devices never go back: pin "
            f"it there, or roll back"
        )
        raise InvalidInputError(msg)
    if device.health is Health.UPDATING:
        device = replace(device, health=Health.WAITING, wave=None)
    return replace(device, pinned=release)


def _fell_back(device: Device, plan: Plan, now: float) -> Device:
    flaps = device.flaps + 1
    device = replace(device, flaps=flaps)
    if flaps >= plan.max_flaps:
        reason = f"came back with another student {flaps} times after its commit"
        return _fail(device, plan, now, reason)
    if device.wave is None:
        return replace(device, health=Health.WAITING)
    return replace(device, health=Health.UPDATING, told_at=now)


def _fail(
    device: Device, plan: Plan, now: float, reason: str, health: Health = Health.FAILED
) -> Device:
    """It failed: this counts in the present rollout, and towards the penalty box for later ones."""
    strikes = device.strikes + (not device.failed)
    box_s = 0.0 if device.failed else plan.box_seconds(strikes)
    return replace(
        device,
        health=health,
        reason=reason,
        strikes=strikes,
        boxed_until=now + box_s if box_s else device.boxed_until,
    )
