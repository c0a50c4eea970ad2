"""Which demonstrations a job learns, holds out, replays and asks again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from cloud import lessons
from cloud.lessons import CONFIRMED, EARLIER, REPLAY, Evidence, Lessons

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.v1 import device_pb2
    from tests.jobs.jobs_evidence import (
        CONFIRMATION,
        FIRST_MS,
        demonstration,
        demonstrations,
        drift,
    )
else:
    from jobs_evidence import CONFIRMATION, FIRST_MS, demonstration, demonstrations, drift


def divide(
    new: Sequence[device_pb2.Demonstration],
    settled: Sequence[tuple[device_pb2.Demonstration, bool]] = (),
    most: int = 400,
    confirmed: Sequence[device_pb2.Demonstration] = (),
) -> Lessons[device_pb2.Demonstration]:
    return lessons.divide(new, settled, lessons.shown, most, confirmed)


@given(st.integers(9, 400))
def test_every_demonstration_is_learnt_or_held_out_whatever_their_order(number: int) -> None:
    new = demonstrations(number)
    found = divide(new)
    ids = [d.id for d in (*found.learn, *found.held_out)]
    assert sorted(ids) == sorted(d.id for d in new)
    assert found.learn
    assert 8 <= len(found.held_out) <= 40
    assert divide(new[::-1]) == found


def test_what_was_trained_on_before_is_not_held_out() -> None:
    new = demonstrations(40)
    before = divide(new).held_out[:6]
    known = [demonstration(d.messages[0].content, "right") for d in before]  # said again
    found = divide(new, [(d, False) for d in known])
    assert len(found.held_out) == len(divide(new).held_out)
    assert all(d in found.learn for d in before)
    changed = [demonstration(d.messages[0].content, "another") for d in before]
    assert divide(new, [(d, False) for d in changed]).held_out == divide(new).held_out


def test_of_each_request_what_was_said_last_stands_and_nothing_new() -> None:
    old, corrected = demonstration("lamp", "on"), demonstration("lamp", "off")
    tested, learnt, *new = demonstrations(20)
    settled = [(old, True), (tested, True), (learnt, False), (new[0], False), (corrected, False)]
    found = divide(new, settled)
    assert found.earlier == [tested]
    assert sorted(d.id for d in found.replay) == sorted(d.id for d in (learnt, corrected))


def test_a_job_takes_no_more_than_it_can_learn_and_the_others_wait() -> None:
    new = demonstrations(300)
    found = divide(new, most=60)
    assert (len(found.learn), len(found.held_out), len(found.waiting)) == (60, 40, 200)
    everything = divide(new)
    assert everything.held_out == found.held_out
    assert everything.learn == found.learn + found.waiting
    ids = [tuple(d.id for d in p) for p in (found.learn, found.held_out, found.waiting)]
    assert found.evidence == Evidence(*ids)


def test_what_is_replayed_and_asked_again_is_bounded_and_the_same_whatever_the_order() -> None:
    new, confirmed = demonstrations(20), demonstrations(50, source=CONFIRMATION)
    settled = [(d, i % 2 == 0) for i, d in enumerate(demonstrations(2 * REPLAY + 20))]
    found = divide(new, settled, confirmed=confirmed)
    assert len(found.replay) == REPLAY + CONFIRMED
    assert len(found.earlier) == EARLIER
    assert divide(new, settled[::-1], confirmed=confirmed[::-1]) == found


def test_no_confirmed_answer_is_replayed_that_is_taught_or_tested() -> None:
    new, (tested, other) = demonstrations(20), demonstrations(2)
    confirmed = [
        demonstration(d.messages[0].content, "right", source=CONFIRMATION)
        for d in (new[0], tested, other)
    ]
    found = divide(new, [(tested, True)], confirmed=confirmed)
    assert found.replay == [confirmed[2]]


def test_a_confirmed_answer_is_not_replayed_though_its_test_is_not_asked_again_this_time() -> None:
    tested = demonstrations(EARLIER + 10)
    confirmed = [
        demonstration(d.messages[0].content, "right", source=CONFIRMATION) for d in tested[-20:]
    ]
    found = divide(demonstrations(20), [(d, True) for d in tested], confirmed=confirmed)
    assert (len(found.earlier), found.replay) == (EARLIER, [])


def test_of_one_request_the_newest_answer_counts() -> None:
    old, other, new = (demonstration(r, a) for r, a in (("x", "1"), ("y", "1"), ("x", "2")))
    assert lessons.newest_each([old, other, new]) == [new, other]


def test_a_correction_that_is_confirmed_later_is_still_a_correction() -> None:
    """Working memory answers right after the first correction, and people say so."""
    corrected = demonstration("x", "right")
    confirmed = demonstration("x", "right", source=CONFIRMATION)
    assert lessons.newest_each([corrected, confirmed]) == [corrected]
    other = demonstration("x", "another", source=CONFIRMATION)
    assert lessons.newest_each([corrected, other]) == [other]


def test_what_is_older_than_a_learnt_answer_does_not_come_back() -> None:
    stale, learnt, later = (demonstration("x", a) for a in ("old", "new", "newest"))
    assert lessons.newest_each([stale, learnt], {learnt.id}) == []
    assert lessons.newest_each([stale, learnt, later], {learnt.id}) == [later]


def test_confirmations_count_after_an_alarm_of_their_device_and_student() -> None:
    corrected = demonstrations(2)
    after = demonstrations(1, source=CONFIRMATION)
    before = demonstrations(1, source=CONFIRMATION, created_ms=FIRST_MS - 1)
    elsewhere = demonstrations(1, source=CONFIRMATION, device="lamp-2")
    alarms = lessons.alarms([drift(), drift(created_ms=FIRST_MS + 10**9)])
    assert alarms == {("lamp-1", "d" * 64): FIRST_MS}
    found = lessons.worth_learning([*corrected, *after, *before, *elsewhere], alarms)
    assert found == [*corrected, *after]
    assert lessons.worth_learning(demonstrations(3, source=CONFIRMATION), alarms) == []


def test_of_confirmations_at_most_as_many_as_there_are_corrections_are_worth_learning() -> None:
    corrected, confirmed = demonstrations(2), demonstrations(7, source=CONFIRMATION)
    alarms = lessons.alarms([drift()])
    found = lessons.worth_learning([*confirmed, *corrected], alarms)
    assert found[:2] == corrected
    assert len(found) == 4
    assert all(d in confirmed for d in found[2:])
    assert lessons.worth_learning([*corrected, *confirmed[::-1]], alarms) == found
