"""Feeds the guard: reads what was stored of a channel's devices, and halts a release that is worse.

The rules are in :mod:`cloud.rollout.guard`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud.rollout import guard
from cloud.rollout.state import Phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud.evidence.store import EvidenceStore
    from cloud.rollout.driver import RolloutDriver

_ACTS = (Phase.RUNNING, Phase.PAUSED)


class Guarding:
    """Guards one channel's rollouts; all methods from one thread at a time.

    Args:
        channel: the channel.
        evidence: what devices said.
        driver: halts.
        clock: seconds since 1970, as the driver's.
    """

    def __init__(
        self,
        *,
        channel: str,
        evidence: EvidenceStore,
        driver: RolloutDriver,
        clock: Callable[[], float],
    ) -> None:
        self._channel = channel
        self._evidence = evidence
        self._driver = driver
        self._clock = clock
        self._version = 0
        self._read = 0  # the last demonstration
        self._judgements: list[guard.Judgement] = []
        self._judged: tuple[int, int, int, int] | None = None

    def tick(self) -> None:
        """Look at what is new since the last time.

        Raises:
            StorageError: the disk failed.
        """
        state = self._driver.state(self._channel)
        plan, now = state.plan, self._clock()
        if (
            not plan.guard_error
            or state.by_guard
            or state.complete
            or state.phase not in _ACTS
            or now > state.began_at + plan.guard_before_s
        ):
            return
        since_ms = int((state.began_at - plan.guard_before_s) * 1000)
        if state.version != self._version:
            self._version, self._read, self._judgements = state.version, 0, []
        rows = self._evidence.judgements(self._channel, after=self._read, since_ms=since_ms)
        self._judgements += [
            guard.Judgement(r.device, r.student, r.received_ms / 1000, r.corrected, r.schema_broken)
            for r in rows
        ]
        self._read = rows[-1].seq if rows else self._read
        alarms = [
            guard.Alarm(a.device, a.student, a.received_ms / 1000)
            for a in self._evidence.alarms(self._channel, since_ms=since_ms)
        ]
        took = len(guard.those_that_took(state))
        judged = (state.version, self._read, len(alarms), took)
        if judged == self._judged:
            return
        self._judged = judged
        signals = guard.evidence(state, self._judgements, alarms)
        reason = guard.judge(signals, error=plan.guard_error, margin=plan.guard_margin)
        if reason is not None:
            self._driver.worse(self._channel, state.version, reason)
