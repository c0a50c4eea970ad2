"""When is it worth adapting, and at which layer: a pure decision.

Context comes first and costs nothing (devices use corrections at once); weights follow when a
channel has drifted and there is enough evidence to learn from and to hold out for the gate.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PolicyConfig:
    """Bounds of the decision.

    ``demonstrations`` is how many unlearned ones an adaptation needs, ``drifted_share`` (0..1) how
    many of the channel's known devices must have raised an alarm since the release they run,
    ``growth`` by which factor evidence must grow after an attempt that failed its gate.
    """

    demonstrations: int = 120
    drifted_share: float = 0.5
    growth: float = 1.5


@dataclass(frozen=True)
class Situation:
    """What is known of one channel.

    ``failed_with`` is how much of the evidence there was when an attempt failed; ``left`` what
    waits because the last job, which did not fail, had enough: it needs no new alarm.
    """

    devices: int
    drifted: int
    unlearned: int
    busy: str = ""
    failed_with: int = 0
    left: int = 0


@dataclass(frozen=True)
class Decision:
    """Whether to adapt now, at which layer, and why (for people)."""

    adapt: bool
    layer: str
    reason: str


def decide(situation: Situation, config: PolicyConfig) -> Decision:
    """Decide for one channel.

    >>> decide(Situation(devices=3, drifted=2, unlearned=150), PolicyConfig())
    Decision(adapt=True, layer='weights', reason='2 of 3 devices drifted, 150 demonstrations')
    >>> decide(Situation(devices=3, drifted=0, unlearned=150), PolicyConfig()).reason
    'no drift: 0 of 3 devices, 2 needed'
    >>> decide(Situation(devices=3, drifted=0, unlearned=150, left=130), PolicyConfig()).reason
    '130 demonstrations waited for the job before'
    """
    if situation.busy:
        return Decision(adapt=False, layer="context", reason=f"busy: {situation.busy}")
    if situation.left >= config.demonstrations:
        reason = f"{situation.left} demonstrations waited for the job before"
        return Decision(adapt=True, layer="weights", reason=reason)
    needed = max(1, -int(-situation.devices * config.drifted_share // 1))
    if situation.drifted < needed:
        reason = f"no drift: {situation.drifted} of {situation.devices} devices, {needed} needed"
        return Decision(adapt=False, layer="context", reason=reason)
    floor = max(config.demonstrations, round(situation.failed_with * config.growth))
    if situation.unlearned < floor:
        reason = f"drift, but {situation.unlearned} demonstrations of {floor} needed"
        return Decision(adapt=False, layer="context", reason=reason)
    reason = (
        f"{situation.drifted} of {situation.devices} devices drifted, "
        f"{situation.unlearned} demonstrations"
    )
    return Decision(adapt=True, layer="weights", reason=reason)
