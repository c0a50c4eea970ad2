"""The sender's decisions, as properties over all histories."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from edge.link.policy import Flight, SendPolicy, answered, full_jitter, plan, reconnected

_IDS = [f"item-{n}" for n in range(12)]
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.floats(0.01, 100)),
        st.tuples(st.just("put"), st.integers(1, 4)),
        st.tuples(st.just("answer"), st.integers(0, 11)),
        st.tuples(st.just("reconnect"), st.none()),
    ),
    max_size=60,
)


@given(steps=_STEPS, window=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_sender_keeps_its_bounds_in_every_history(
    steps: list[tuple[str, float | int | None]], window: int, seed: int
) -> None:
    policy = SendPolicy(window=window, ack_timeout_s=5, silence_cap_s=30)
    random = Random(seed)
    flight, now, unused = Flight(), 0.0, list(_IDS)
    waiting: list[str] = []
    for kind, value in steps:
        if kind == "pass":
            now += float(value or 0)
        elif kind == "put":
            waiting += [unused.pop(0) for _ in range(min(int(value or 0), len(unused)))]
        elif kind == "answer":
            gone = {i for i in (_IDS[int(value or 0)],) if i in waiting}
            waiting = [i for i in waiting if i not in gone]
            flight = answered(flight, gone) if gone else flight
        else:
            flight = reconnected(flight)
        before = flight
        planned = plan(policy, flight, waiting, now=now, random=random)
        flight = planned.flight

        still = {i for i, at in before.overdue_at.items() if at > now}
        assert len(flight.overdue_at) <= max(window, len(still & set(waiting)))
        assert not still & set(planned.send), "nothing under way is sent again"
        assert set(planned.send) <= set(waiting), "nothing answered is sent again"
        assert len(set(planned.send)) == len(planned.send)
        if flight.silent:
            assert len(planned.send) <= 1, "a silent cloud gets one probe at a time"
        if waiting:
            assert flight.overdue_at, "something is always under way while something waits"
            assert planned.again_at is not None
            assert now < planned.again_at <= now + 5 + 30
        again = plan(policy, flight, waiting, now=now, random=random)
        assert not again.send, "asked twice at the same moment, it sends once"


@given(lost=st.lists(st.booleans(), max_size=40), count=st.integers(1, 12), seed=st.integers(0, 9))
def test_everything_is_delivered_once_the_cloud_answers(
    lost: list[bool], count: int, seed: int
) -> None:
    policy = SendPolicy(window=3)
    random, flight, now = Random(seed), Flight(), 0.0
    waiting, losses = _IDS[:count], list(lost)
    for _ in range(len(lost) + count + 40):
        planned = plan(policy, flight, waiting, now=now, random=random)
        flight = planned.flight
        arrived = {i for i in planned.send if not (losses and losses.pop(0))}
        waiting = [i for i in waiting if i not in arrived]
        if arrived:
            flight = answered(flight, arrived)
        elif planned.again_at is not None:
            now = planned.again_at
    assert not waiting


def test_an_item_without_an_answer_does_not_hold_up_the_others() -> None:
    policy = SendPolicy(window=2)
    random, flight, now = Random(0), Flight(), 0.0
    poison, waiting = {"item-0", "item-1"}, list(_IDS)
    for _ in range(60):
        seen = waiting[: 2 * policy.window]
        planned = plan(policy, flight, seen, now=now, random=random)
        flight = planned.flight
        arrived = set(planned.send) - poison
        waiting = [i for i in waiting if i not in arrived]
        flight = answered(flight, arrived) if arrived else flight
        if not arrived and planned.again_at is not None:
            now = planned.again_at
    assert set(waiting) == poison


def test_a_new_connection_sends_again_what_was_under_way() -> None:
    policy, random = SendPolicy(), Random(0)
    flight = plan(policy, Flight(), ["a", "b"], now=0, random=random).flight
    assert plan(policy, flight, ["a", "b"], now=1, random=random).send == ()
    assert plan(policy, reconnected(flight), ["a", "b"], now=1, random=random).send == ("a", "b")


@given(attempt=st.integers(0, 10_000), seed=st.integers(0, 99))
def test_jitter_is_full_and_capped(attempt: int, seed: int) -> None:
    wait = full_jitter(attempt, base_s=0.5, cap_s=30, random=Random(seed))
    assert 0 <= wait <= min(30, 0.5 * 2.0 ** min(attempt, 40))
