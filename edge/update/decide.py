"""What the update client decides from its journal's record: pure, so that simulators drive it too.

:mod:`edge.update.machine` is the table; here is how the record goes through it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edge.update.journal import Record
from edge.update.machine import RESTING, Action, Event, advance, count
from edge.update.slots import Entry

if TYPE_CHECKING:
    from edge.update.machine import Transition

MAX_STRIKES = 3
"""Times that bytes of one update may be wrong, each for deltas and for full files."""

MAX_DISK_TRIES = 10
"""Times that a full or failing disk is tried in one state."""


def news(record: Record, *, target: int | None, serving: int) -> Event | None:
    """What the cloud's target means for what is going on.

    Args:
        record: the journal's.
        target: the release that the cloud wants; 0: nothing to do; None: the cloud was not heard.
        serving: the release in service.

    >>> news(Record(floor=3), target=4, serving=3).name
    'TARGET'
    >>> news(Record(floor=3), target=2, serving=1)
    """
    new = (
        target is not None
        and target > serving
        and target >= record.floor
        and target != record.failed.release
    )
    if record.state in RESTING:
        return Event.TARGET if new else None
    if target is None or target == record.release:
        return None
    return Event.TARGET if new else Event.WITHDRAWN


def enter(
    record: Record,
    event: Event,
    *,
    target: int | None,
    serving: Entry,
    delta_bytes: int,
    now_ms: int,
) -> tuple[Record, Transition]:
    """The record to write before anything is done, and what is to be done then.

    Args:
        record: the journal's.
        event: what happened.
        target: the release that the cloud wants.
        serving: what serves now: where a rollback will go.
        delta_bytes: fetched so far, for the report.
        now_ms: milliseconds since the epoch, by the device's clock.
    """
    before = record.state
    step = advance(before, event, steps=record.steps, probe_starts=record.probe_starts)
    record = replace(record, state=step.state, steps=count(record.steps, before, event, step))
    if Action.BEGIN in step.actions:
        record = Record(  # a clean sheet for the wanted release; what must last, lasts
            state=record.state,
            release=target or 0,
            base=serving,
            steps=record.steps,
            failed=record.failed,
            floor=record.floor,
            sequence=record.sequence,
            reports=record.reports,
        )
    if Action.REMEMBER in step.actions:
        record = replace(record, failed=Entry(record.student, record.release))
    if Action.PROBE in step.actions:
        record = replace(record, probe_starts=record.probe_starts + 1)
    if step.report is not None:
        record = record.reporting(
            step.report, serving=serving.student, delta_bytes=delta_bytes, now_ms=now_ms
        )
    return record, step
