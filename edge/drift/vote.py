"""The vote: when do the signals together make an alarm, and of which kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

SURPRISE, SCHEMA, CORRECTION = SIGNALS = ("surprise", "schema", "correction")


class Kind(StrEnum):
    """What an alarm rests on."""

    INPUT = "input"
    """Signals without labels: inputs look new, the student is unsure."""
    CONCEPT = "concept"
    """Corrections: what people want has changed."""
    BOTH = "both"


@dataclass(frozen=True)
class Ballot:
    """The rules of the vote.

    Attributes:
        surprise, schema, correction: weight of each signal's vote.
        threshold: sum of weights that makes an alarm.
        window: answers for which a vote stands.
    """

    surprise: int = 1
    schema: int = 1
    correction: int = 2
    threshold: int = 2
    window: int = 50


@dataclass(frozen=True)
class Vote:
    """A detector fired ``age`` answers ago; a ``decisive`` vote is enough by itself."""

    signal: str
    age: int
    decisive: bool = False


def tally(votes: Iterable[Vote], ballot: Ballot) -> Kind | None:
    """Count the votes that still stand.

    >>> tally([Vote("surprise", age=3)], Ballot()) is None
    True
    >>> tally([Vote("surprise", age=3), Vote("schema", age=9)], Ballot())
    <Kind.INPUT: 'input'>
    >>> tally([Vote("correction", age=0)], Ballot())
    <Kind.CONCEPT: 'concept'>
    """
    standing = {v.signal: v for v in votes if v.age <= ballot.window}
    weights = {SURPRISE: ballot.surprise, SCHEMA: ballot.schema, CORRECTION: ballot.correction}
    total = sum(weights[s] for s in standing)
    if total < ballot.threshold and not any(v.decisive for v in standing.values()):
        return None
    if CORRECTION not in standing:
        return Kind.INPUT
    return Kind.CONCEPT if len(standing) == 1 else Kind.BOTH
