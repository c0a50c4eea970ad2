"""The table of updates: every way through it ends, and where it should."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.update.machine import (
    MAX_PROBE_STARTS,
    MAX_STEPS,
    RESTING,
    TABLE,
    Action,
    Event,
    State,
    advance,
    count,
)
from protos.v1 import fleet_pb2

HAPPY = (Event.TARGET, Event.FETCHED, Event.VERIFIED, Event.APPLIED, Event.PROBED, Event.FINISHED)


def walk(state: State, *events: Event) -> list[State]:
    states = []
    for event in events:
        state = advance(state, event, steps=1, probe_starts=1).state
        states.append(state)
    return states


def test_states_are_the_protocols() -> None:
    ours = {f"UPDATE_STATE_{s.name}": int(s) for s in State}
    assert ours | {"UPDATE_STATE_UNSPECIFIED": 0} == dict(fleet_pb2.UpdateState.items())


def test_the_page_about_updates_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "update.md").read_text()
    shown = [line for line in page.splitlines() if line.startswith("| `")]
    rows = [
        f"| `{state.name}` | {event} | `{step.state.name}` | "
        f"{', '.join(a.name for a in step.actions) or '-'} |"
        for (state, event), step in TABLE.items()
    ]
    assert shown[-len(rows) :] == rows
    assert {f"| `{s.name}` |" for s in State} <= {r[: r.index("|", 2) + 1] for r in shown}
    assert f"may have {MAX_STEPS} entries" in page


def test_a_release_goes_through_every_state_in_order() -> None:
    assert [s.name for s in walk(State.IDLE, *HAPPY)] == [
        "FETCHING",
        "VERIFYING",
        "APPLYING",
        "PROBING",
        "COMMITTED",
        "IDLE",
    ]


def test_committed_is_reported_when_it_is_true() -> None:
    entering = advance(State.PROBING, Event.PROBED, steps=5, probe_starts=1)
    leaving = advance(State.COMMITTED, Event.FINISHED, steps=6, probe_starts=1)
    assert entering.report is None
    assert leaving.report is State.COMMITTED


def test_a_failed_probe_rolls_back_and_is_remembered() -> None:
    step = advance(State.PROBING, Event.PROBE_FAILED, steps=5, probe_starts=1)
    assert step.state is State.ROLLING_BACK
    assert step.actions == (Action.REMEMBER, Action.RESTORE)
    assert walk(State.ROLLING_BACK, Event.FINISHED, Event.FINISHED)[-1] is State.IDLE


@pytest.mark.parametrize("state", State)
def test_every_state_can_be_resumed(state: State) -> None:
    assert (state, Event.RESUMED) in TABLE


@pytest.mark.parametrize("state", [s for s in State if s not in RESTING])
def test_every_working_state_can_fail(state: State) -> None:
    assert (state, Event.FATAL) in TABLE


@pytest.mark.parametrize("state", list(State)[1:5])
def test_until_the_commit_a_release_can_be_superseded_or_withdrawn(state: State) -> None:
    assert walk(state, Event.TARGET) == [State.FETCHING]
    assert walk(state, Event.WITHDRAWN) == [State.IDLE]


def test_nothing_touches_what_serves_before_the_commit() -> None:
    before = {State.IDLE, State.FETCHING, State.VERIFYING, State.APPLYING}
    for (state, _), step in TABLE.items():
        if state in before:
            assert Action.COMMIT not in step.actions
            assert Action.RESTORE not in step.actions


def test_an_event_out_of_place_is_a_fault_of_the_caller() -> None:
    with pytest.raises(ValueError, match="no way out of IDLE on PROBED"):
        advance(State.IDLE, Event.PROBED, steps=0, probe_starts=0)


def test_a_student_that_takes_the_process_down_fails_its_probe() -> None:
    again = advance(State.PROBING, Event.RESUMED, steps=6, probe_starts=MAX_PROBE_STARTS - 1)
    enough = advance(State.PROBING, Event.RESUMED, steps=7, probe_starts=MAX_PROBE_STARTS)
    assert again.state is State.PROBING
    assert enough.state is State.ROLLING_BACK


def test_restarts_while_fetching_are_not_counted() -> None:
    step = advance(State.FETCHING, Event.RESUMED, steps=9, probe_starts=0)
    assert count(9, State.FETCHING, Event.RESUMED, step) == 9


@given(st.lists(st.sampled_from(Event), min_size=200, max_size=200))
def test_no_sequence_of_crashes_and_faults_runs_in_circles(events: list[Event]) -> None:
    """Without a new release or a long line, an update ends within a bounded number of entries."""
    outside = {Event.TARGET, Event.WITHDRAWN}
    state, steps, starts, entries = State.FETCHING, 1, 0, 0
    for event in events:
        if (
            (state, event) not in TABLE
            or event in outside
            or (state, event)
            == (
                State.FETCHING,
                Event.RESUMED,
            )
        ):
            continue
        step = advance(state, event, steps=steps, probe_starts=starts)
        steps = count(steps, state, event, step)
        starts += Action.PROBE in step.actions
        state, entries = step.state, entries + 1
        if state in RESTING:
            return
        assert entries <= 4 * MAX_STEPS


@pytest.mark.parametrize("state", [s for s in State if s not in RESTING | {State.FETCHING}])
def test_a_device_that_restarts_for_ever_in_a_state_gets_out_of_it(state: State) -> None:
    start, steps, starts = state, 1, 1
    for _ in range(3 * MAX_STEPS + 3):
        step = advance(state, Event.RESUMED, steps=steps, probe_starts=starts)
        steps = count(steps, state, Event.RESUMED, step)
        starts += Action.PROBE in step.actions
        state = step.state
        if state in RESTING | {State.FETCHING}:
            return
    pytest.fail(f"still {state.name} after {start.name}")
