"""The states of an update, as one explicit table: no I/O, no clock.

1. The state is written to the journal before anything is done in it, so that a device killed in any
   state takes the same work up again; all work can be done twice.
2. Until the commit nothing that serves was touched: giving up is forgetting. From the commit on the
   old student comes back by rolling back.
3. What failed is remembered and not tried again until a newer release.
4. Each step of one update is counted. At :data:`MAX_STEPS` something goes round in circles: the
   update fails, and if not even that comes to an end, the device says that it is inconsistent.
5. A student whose probe took the process down :data:`MAX_PROBE_STARTS` times has failed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_STEPS = 28
"""Journal entries of one update (the bound of Mender's client)."""

MAX_PROBE_STARTS = 2
"""Probes of one student that may begin without an end."""


class State(IntEnum):
    """``UpdateState`` of ``protos/v1/fleet.proto``, by the same numbers."""

    IDLE = 1
    FETCHING = 2
    VERIFYING = 3
    APPLYING = 4
    PROBING = 5
    COMMITTED = 6
    ROLLING_BACK = 7
    FAILED = 8
    INCONSISTENT = 9


RESTING = frozenset({State.IDLE, State.INCONSISTENT})
"""States in which the client waits for a release."""


class Event(StrEnum):
    """What can happen."""

    TARGET = "a newer release is wanted"
    WITHDRAWN = "the release is no longer wanted"
    FETCHED = "all downloads are here"
    VERIFIED = "all downloads are what the manifest says"
    REFETCH = "something must be fetched again, or another thing instead"
    APPLIED = "the slot is complete"
    PROBED = "the new student passed its probe"
    PROBE_FAILED = "the new student failed its probe"
    FINISHED = "the state's work is done"
    FATAL = "trying again cannot help"
    RESUMED = "the process was restarted in this state"


class Action(StrEnum):
    """What a transition asks for, in this order."""

    BEGIN = "forget the release before, take the new one"
    REMEMBER = "remember that this student failed"
    FETCH = "get the manifest and what it needs"
    VERIFY = "check the downloads"
    APPLY = "make the slot"
    PROBE = "open the new student and run the canaries"
    COMMIT = "swap, move the pointer, wipe what the release covers"
    RESTORE = "bring the old student back"
    CLEAN = "delete what is not needed any more"


@dataclass(frozen=True)
class Transition:
    """The next state, what to do once it is in the journal, and what the cloud is told of it."""

    state: State
    actions: tuple[Action, ...] = ()
    report: State | None = None


def _enter(state: State, *actions: Action) -> Transition:
    return Transition(state, actions, report=state)


_BEGIN = _enter(State.FETCHING, Action.BEGIN, Action.FETCH)
_AGAIN = Transition(State.FETCHING, (Action.FETCH,))
_FORGET = _enter(State.IDLE, Action.CLEAN)
_FAIL = _enter(State.FAILED, Action.REMEMBER, Action.CLEAN)
_ROLL_BACK = _enter(State.ROLLING_BACK, Action.REMEMBER, Action.RESTORE)
_GIVE_UP = _enter(State.INCONSISTENT)
_REST = Transition(State.IDLE, (Action.CLEAN,))

TABLE: Mapping[tuple[State, Event], Transition] = MappingProxyType(
    {
        (State.IDLE, Event.TARGET): _BEGIN,
        (State.IDLE, Event.RESUMED): _REST,
        # Nothing that serves is touched before the commit.
        (State.FETCHING, Event.FETCHED): _enter(State.VERIFYING, Action.VERIFY),
        (State.FETCHING, Event.REFETCH): _AGAIN,
        (State.FETCHING, Event.TARGET): _BEGIN,
        (State.FETCHING, Event.WITHDRAWN): _FORGET,
        (State.FETCHING, Event.FATAL): _FAIL,
        (State.FETCHING, Event.RESUMED): _AGAIN,
        (State.VERIFYING, Event.VERIFIED): _enter(State.APPLYING, Action.APPLY),
        (State.VERIFYING, Event.REFETCH): _AGAIN,
        (State.VERIFYING, Event.TARGET): _BEGIN,
        (State.VERIFYING, Event.WITHDRAWN): _FORGET,
        (State.VERIFYING, Event.FATAL): _FAIL,
        (State.VERIFYING, Event.RESUMED): _AGAIN,  # finds what is there already
        (State.APPLYING, Event.APPLIED): _enter(State.PROBING, Action.PROBE),
        (State.APPLYING, Event.REFETCH): _AGAIN,
        (State.APPLYING, Event.TARGET): _BEGIN,
        (State.APPLYING, Event.WITHDRAWN): _FORGET,
        (State.APPLYING, Event.FATAL): _FAIL,
        (State.APPLYING, Event.RESUMED): _AGAIN,  # the base may have changed meanwhile
        (State.PROBING, Event.PROBED): Transition(State.COMMITTED, (Action.COMMIT,)),
        (State.PROBING, Event.PROBE_FAILED): _ROLL_BACK,
        (State.PROBING, Event.REFETCH): _AGAIN,  # the slot was altered on the disk
        (State.PROBING, Event.TARGET): _BEGIN,
        (State.PROBING, Event.WITHDRAWN): _FORGET,
        (State.PROBING, Event.FATAL): _ROLL_BACK,
        (State.PROBING, Event.RESUMED): Transition(State.PROBING, (Action.PROBE,)),
        # From here on the new student may serve. The cloud is told when all is done.
        (State.COMMITTED, Event.FINISHED): Transition(
            State.IDLE, (Action.CLEAN,), report=State.COMMITTED
        ),
        (State.COMMITTED, Event.REFETCH): _AGAIN,  # as above: the old student serves still
        (State.COMMITTED, Event.FATAL): _ROLL_BACK,
        (State.COMMITTED, Event.RESUMED): Transition(State.COMMITTED, (Action.COMMIT,)),
        (State.ROLLING_BACK, Event.FINISHED): _enter(State.FAILED, Action.CLEAN),
        (State.ROLLING_BACK, Event.FATAL): _GIVE_UP,
        (State.ROLLING_BACK, Event.RESUMED): Transition(State.ROLLING_BACK, (Action.RESTORE,)),
        (State.FAILED, Event.FINISHED): Transition(State.IDLE),
        (State.FAILED, Event.FATAL): _GIVE_UP,
        (State.FAILED, Event.RESUMED): Transition(State.FAILED, (Action.CLEAN,)),
        (State.INCONSISTENT, Event.TARGET): _BEGIN,
        # Every start of the process finds a student that can serve, or does not get this far.
        (State.INCONSISTENT, Event.RESUMED): _REST,
    }
)


def advance(state: State, event: Event, *, steps: int, probe_starts: int) -> Transition:
    """What follows from ``event`` in ``state``.

    Args:
        state: the state in the journal.
        event: what happened.
        steps: journal entries of this update so far.
        probe_starts: probes of this update so far.

    Raises:
        ValueError: the event cannot happen in this state: a fault of the caller.

    >>> advance(State.PROBING, Event.PROBE_FAILED, steps=5, probe_starts=1).state.name
    'ROLLING_BACK'
    >>> advance(State.APPLYING, Event.REFETCH, steps=MAX_STEPS, probe_starts=0).state.name
    'FAILED'
    """
    if (state, event) not in TABLE:
        msg = f"the update machine has no way out of {state.name} on {event.name}"
        raise ValueError(msg)
    too_long = steps >= MAX_STEPS and event in (Event.RESUMED, Event.REFETCH)
    if state is State.PROBING and event is Event.RESUMED and probe_starts >= MAX_PROBE_STARTS:
        event = Event.PROBE_FAILED
    elif too_long and state not in RESTING:
        event = Event.FATAL
    return TABLE[state, event]


def count(steps: int, state: State, event: Event, transition: Transition) -> int:
    """Journal entries of this update after the transition.

    A release begins a new count, and so does giving it up: bringing the old student back must not
    fail for what went before. Restarts while fetching do not count: a device that is switched off
    every night for a month only has a slow line.
    """
    if Action.BEGIN in transition.actions or Action.REMEMBER in transition.actions:
        return 1
    return steps if (state, event) == (State.FETCHING, Event.RESUMED) else steps + 1
