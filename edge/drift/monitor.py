"""The drift monitor of one device: feeds the detectors, holds the vote, speaks once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from edge.drift import settle
from edge.drift.baseline import LevelBaseline, RateBaseline
from edge.drift.detector import Detector, Limits
from edge.drift.vote import CORRECTION, SCHEMA, SIGNALS, SURPRISE, Ballot, Kind, Vote, tally
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class DriftConfig:
    """What an operator may set.

    Attributes:
        expected_corrections: share of answers that people correct when all is well, in (0, 0.5].
            A device that was never good is measured against it.
        expected_schema_breaks: share of answers that break the schema when all is well.
        prior_weight: answers that the expectation weighs as much as, before a device knows its own.
        lag: observations before one may count as normal.
        reference: observations that make a full baseline.
        least: observations before a level without a prior (surprise) is known.
        cool_down: answers after an alarm before another one may be raised, if no swap comes first.
        ballot: the rules of the vote.
    """

    expected_corrections: float = 0.2
    expected_schema_breaks: float = 0.05
    prior_weight: int = 20
    lag: int = 30
    reference: int = 200
    least: int = 20
    cool_down: int = 200
    ballot: Ballot = field(default_factory=Ballot)

    def __post_init__(self) -> None:
        """Refuse expectations that no detector can work with."""
        for name in ("expected_corrections", "expected_schema_breaks"):
            value = getattr(self, name)
            if not 0 < value <= 0.5:  # noqa: PLR2004 - a share
                msg = f"{name} is {value}: give a share above 0 and at most 0.5, such as 0.2"
                raise InvalidInputError(msg)


@dataclass(frozen=True)
class SignalState:
    """One signal now: means in the signal's own unit, None before there is one."""

    name: str
    alarmed: bool
    baseline: float | None
    recent: float | None


@dataclass(frozen=True)
class Alarm:
    """Drift was found; ``answered`` counts the answers of this student so far."""

    kind: Kind
    signals: tuple[SignalState, ...]
    answered: int


class DriftMonitor:
    """Takes answers and what people say of them, and says when the device has drifted.

    After an alarm it is silent until :meth:`swapped`, or until ``cool_down`` more answers have
    passed and its detectors find the change again in fresh evidence. A vote that finds no second
    within the ballot's window is overruled: its signal learns its normal anew.
    """

    def __init__(self, *, config: DriftConfig) -> None:
        self._config = config
        self.alarms: dict[Kind, int] = dict.fromkeys(Kind, 0)
        rate = partial(
            RateBaseline, weight=config.prior_weight, lag=config.lag, capacity=config.reference
        )
        level = partial(
            LevelBaseline, least=config.least, lag=config.lag, capacity=config.reference
        )
        corrections, breaks = config.expected_corrections, config.expected_schema_breaks
        self._detectors = {
            SURPRISE: Detector(limits=Limits(slack=0.5, shift=12), baseline=level),
            SCHEMA: Detector(
                limits=Limits(slack=0.5, shift=12.5, expected=breaks),
                baseline=partial(rate, expected=breaks),
            ),
            CORRECTION: Detector(
                limits=Limits(slack=0.5, shift=12.5, expected=corrections),
                baseline=partial(rate, expected=corrections),
            ),
        }
        self.swapped()

    def swapped(self) -> None:
        """Another student serves: nothing that was known of the old one holds."""
        self.answers = 0
        self._drifted = False
        self._open: settle.Open = ()
        self._fired: dict[str, tuple[int, bool]] = {}
        self._quiet_until: int | None = None
        for detector in self._detectors.values():
            detector.restart()

    @property
    def drifted(self) -> bool:
        """Whether an alarm was raised since this student serves."""
        return self._drifted

    def asked(self) -> Alarm | None:
        """A request arrived: the answers before it are settled."""
        self._open, learned = settle.asked_on(self._open)
        return self._observe((CORRECTION, value) for value in learned)

    def answered(self, completion: str, *, surprise: float, schema_broken: bool) -> Alarm | None:
        """The student in service has answered.

        Args:
            completion: the answer's id.
            surprise: mean negative log-likelihood of the answer's tokens, in nats.
            schema_broken: the answer does not satisfy the harness's schema.
        """
        self.answers += 1
        self._open = settle.answered(self._open, completion)
        self._let_pass()
        return self._observe([(SURPRISE, surprise), (SCHEMA, float(schema_broken))])

    def judged(self, completion: str, *, corrected: bool) -> Alarm | None:
        """Somebody corrected or accepted an answer of the student in service."""
        self._open, learned = settle.judged(self._open, completion, corrected=corrected)
        return self._observe((CORRECTION, value) for value in learned)

    def states(self) -> tuple[SignalState, ...]:
        """Every signal as it is now."""
        return tuple(
            SignalState(
                name=name,
                alarmed=name in self._fired,
                baseline=self._detectors[name].baseline,
                recent=self._detectors[name].recent,
            )
            for name in SIGNALS
        )

    def _let_pass(self) -> None:
        """What the passing of one more answer ends: a cool-down, or a vote's time."""
        if self._quiet_until is not None:
            if self.answers >= self._quiet_until:
                self._quiet_until = None
                self._fired.clear()
                for detector in self._detectors.values():
                    detector.rearm()
            return
        for name, (since, _) in list(self._fired.items()):
            if self.answers - since > self._config.ballot.window:
                del self._fired[name]
                self._detectors[name].restart()

    def _observe(self, observations: Iterable[tuple[str, float]]) -> Alarm | None:
        for name, value in observations:
            fired = self._detectors[name].observe(value)
            if fired is not None:
                self._fired[name] = (self.answers, fired.decisive)
        if self._quiet_until is not None:
            return None
        votes = [Vote(s, self.answers - since, d) for s, (since, d) in self._fired.items()]
        kind = tally(votes, self._config.ballot)
        if kind is None:
            return None
        self.alarms[kind] += 1
        self._drifted = True
        self._quiet_until = self.answers + self._config.cool_down
        return Alarm(kind=kind, signals=self.states(), answered=self.answers)
