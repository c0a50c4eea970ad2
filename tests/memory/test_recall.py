"""Which demonstrations are recalled: pure."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge.memory.recall import asked, nearest, normal, same_request
from protos.prompt import Message

WORDS = st.lists(st.sampled_from(["turn", "on", "off", "the", "lamp", "jazz"]), max_size=6)
TEXTS = WORDS.map(" ".join)


def test_the_most_similar_is_last_and_strangers_are_left_out() -> None:
    texts = ["play some jazz", "turn off the lamp", "turn on the lamp"]
    assert nearest("turn on the lamp", texts, limit=3, min_similarity=0.5) == [1, 2]


def test_of_equally_similar_ones_the_newest_comes_last_and_wins_a_place() -> None:
    texts = ["lamp on", "on lamp", "lamp on"]
    assert nearest("lamp on", texts, limit=2, min_similarity=0.5) == [1, 2]


def test_no_room_or_no_memory_recalls_nothing() -> None:
    assert nearest("lamp", ["lamp"], limit=0, min_similarity=0.0) == []
    assert nearest("lamp", [], limit=3, min_similarity=0.0) == []


def test_case_punctuation_and_word_order_do_not_matter() -> None:
    texts = [normal("On, the lamp!")]
    assert nearest(normal("THE LAMP on"), texts, limit=1, min_similarity=1.0) == [0]


def test_what_was_asked_is_the_user_s_last_message() -> None:
    turns = [Message("user", "lamp on"), Message("assistant", "ok"), Message("user", "and off")]
    assert asked(turns) == "and off"
    assert asked([Message("system", "x")]) == ""


def test_requests_are_the_same_only_within_the_same_conversation() -> None:
    alone = [Message("user", "and off")]
    assert same_request(alone) == same_request(
        [Message("system", "Be brief."), Message("user", " And  OFF")]
    )
    assert same_request(alone) != same_request([Message("user", "lamp on"), *alone])
    assert same_request([Message("user", "a\nb")]) == same_request([Message("user", "a b")])


@given(TEXTS, st.lists(TEXTS, max_size=8), st.integers(0, 5), st.floats(0, 1))
def test_recall_keeps_its_bounds(
    query: str, texts: list[str], limit: int, min_similarity: float
) -> None:
    found = nearest(query, texts, limit=limit, min_similarity=min_similarity)
    assert len(found) <= limit
    assert len(set(found)) == len(found)
    everything = nearest(query, texts, limit=len(texts), min_similarity=min_similarity)
    assert found == everything[len(everything) - len(found) :]
