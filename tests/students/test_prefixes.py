"""What of a prompt need not be computed again, and what a new student is warmed with."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from edge.student.engine import Engine
from edge.student.prefix import PrefixCache
from edge.student.runtime import Decoding, Student
from protos.prompt import Message, Shown, chat

if TYPE_CHECKING:
    from pathlib import Path

ONE = Decoding(max_tokens=1, speculate=False)
SYSTEMS = tuple(f"You are the {n} house, and this is all that you need to know." for n in "abc")


@pytest.fixture
def student(tiny_student: Path) -> Student:
    made = Student.open(tiny_student / "bundle")
    assert made._engine.exact
    return made


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each pass that is made."""
    made: list[int] = []
    forward = Engine.forward

    def counted(*args: Any) -> Any:  # noqa: ANN401 - handed on
        made.append(len(args[2]))
        return forward(*args)

    monkeypatch.setattr(Engine, "forward", counted)
    return made


def prompt(system: str, text: str, *shown: Shown) -> list[Message]:
    return chat(system, [Message("user", text)], shown)


def test_several_system_prompts_are_computed_once_each(
    student: Student, computed: list[int]
) -> None:
    for system in SYSTEMS:
        student.answer(prompt(system, "first question"), ONE)
    head = student.prompt_tokens([Message("system", SYSTEMS[0])])
    for system in SYSTEMS:
        computed.clear()
        asked = prompt(system, "another one")
        student.answer(asked, ONE)
        assert sum(computed) <= student.prompt_tokens(asked) - head + 30


def test_demonstrations_of_working_memory_belong_to_the_head(
    student: Student, computed: list[int]
) -> None:
    shown = Shown((Message("user", "lamp " * 20),), "on " * 20)
    student.answer(prompt(SYSTEMS[0], "first", shown), ONE)
    student.answer(prompt(SYSTEMS[1], "something else"), ONE)
    computed.clear()
    student.answer(prompt(SYSTEMS[0], "second", shown), ONE)
    assert sum(computed) < 60


def test_a_conversation_goes_on_from_where_it_was(student: Student, computed: list[int]) -> None:
    said = student.answer(prompt(SYSTEMS[0], "begin"), Decoding(20)).text
    turns = [Message("user", "begin"), Message("assistant", said), Message("user", "on")]
    computed.clear()
    student.answer(chat(SYSTEMS[0], turns), ONE)
    assert sum(computed) < 80


def test_what_is_kept_is_bounded_and_the_oldest_leaves_first(student: Student) -> None:
    engine = student._engine
    ids = [[system] * 40 for system in range(10, 20)]
    chats = []
    for text in ids:
        chat_ = engine.open_chat()
        engine.forward(chat_, [*text, 5], [0])
        chats.append(chat_)
    size = chats[0].copy(40, room=40, grain=32).nbytes
    cache = PrefixCache(max_bytes=3 * size)
    for number, made in enumerate(chats):
        cache.keep_head(made, 40, [Message("user", str(number))])
        assert cache.nbytes <= 3 * size
    assert [m.content for (m,) in cache.heads] == ["9", "8", "7"]
    assert cache.take([*ids[7], 5], engine.open_chat()).ids == ids[7]
    cache.keep_head(chats[0], 40, [Message("user", "0")])
    assert [m.content for (m,) in cache.heads] == ["0", "7", "9"]
    assert cache.take([*ids[8], 5], engine.open_chat()).ids == []


def test_the_last_token_of_a_prompt_is_always_computed(student: Student) -> None:
    asked = prompt(SYSTEMS[0], "again")
    first = student.answer(asked, Decoding(8))
    assert student.answer(asked, Decoding(8)) == first


def test_two_answers_in_the_making_do_not_disturb_each_other(student: Student) -> None:
    decoding = Decoding(20)
    texts = ("lamp on", "lamp off please")
    alone = [student.answer(prompt(SYSTEMS[0], t), decoding).text for t in texts]
    runs = [student.begin(prompt(SYSTEMS[0], t), decoding) for t in texts]
    said = ["", ""]
    while not all(r.done for r in runs):
        for i, run in enumerate(runs):
            said[i] += "".join(t.text for t in run.advance())
    assert said == alone


def test_a_long_prompt_is_taken_in_slices(student: Student, computed: list[int]) -> None:
    run = student.begin(prompt(SYSTEMS[0], "x" * 300), ONE)
    passes = 0
    while not run.done:
        run.advance()
        passes += 1
    assert max(computed) <= 64
    assert passes == len(computed) >= 5


def test_an_answer_that_is_given_up_leaves_a_cache_that_is_right(student: Student) -> None:
    asked = prompt(SYSTEMS[0], "lamp on")
    whole = student.answer(asked, Decoding(20))
    other = prompt(SYSTEMS[1], "x" * 100)
    for steps in range(4):
        run = student.begin(other, Decoding(20))
        for _ in range(steps):
            run.advance()
        run.close()
        run.close()
        assert student.answer(asked, Decoding(20)) == whole


def test_a_new_student_is_warm_before_its_first_request(
    student: Student, tiny_student: Path, computed: list[int]
) -> None:
    own = student.harness.system
    shown = Shown((Message("user", "lamp " * 10),), "on")
    student.answer(prompt(own, "one", shown), Decoding(20))
    student.answer(prompt(SYSTEMS[1], "two"), Decoding(20))
    new = Student.open(tiny_student / "bundle")
    new.warm(student.warmth())
    assert len(new._past) == 2
    computed.clear()
    new.answer(prompt(own, "three", shown), ONE)
    new.answer(prompt(SYSTEMS[1], "three"), ONE)
    assert max(computed) < 50


def test_a_new_harness_s_system_prompt_takes_the_old_one_s_place(
    student: Student, tiny_student: Path
) -> None:
    from dataclasses import replace

    student.answer(prompt(student.harness.system, "one"), ONE)
    new = Student.open(tiny_student / "bundle")
    new.harness = replace(new.harness, system=SYSTEMS[2])
    new.warm(student.warmth())
    assert new.warmth().heads == ((Message("system", SYSTEMS[2]),),)


def test_a_closed_student_holds_no_session(tiny_student: Path) -> None:
    import weakref

    made = Student.open(tiny_student / "bundle")
    made.answer(prompt(SYSTEMS[0], "x"), ONE)
    session = weakref.ref(made._engine.session)
    made.close()
    gc.collect()
    assert session() is None


def test_a_student_that_nobody_has_leaves_memory_at_once(tiny_student: Path) -> None:
    """Its tokenizers take tens of megabytes, and a device collects garbage rarely."""
    import weakref

    made = Student.open(tiny_student / "bundle")
    made.answer(prompt(SYSTEMS[0], "x"), Decoding(20))
    made.close()
    left = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert left() is None
    finally:
        gc.enable()
