"""The host: turns, swaps between two requests, and requests that are given up."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

import pytest

from edge.host import BusyError, StudentHost
from protos.errors import UnavailableError
from protos.prompt import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from tests.agent.scripted_student import ScriptedStudent
else:
    from scripted_student import ScriptedStudent

from edge.student.runtime import Decoding, Warmth

ASK = [Message("user", "hi")]


def whole(student: ScriptedStudent) -> Generator[None, None, tuple[str, str]]:
    """Decode an answer as the device does; returns the student's digest and the text."""
    words = []
    run = student.begin(ASK, Decoding(max_tokens=50))
    try:
        while not run.done:
            words += [t.text for t in run.advance()]
            yield
    finally:
        run.close()
    return student.digest, "".join(words)


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until a condition holds."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("the condition did not come true within 10 s")


class Held:
    """A student that stops before its first word until it is let go."""

    def __init__(self, digest: str = "a", text: str = "one two three") -> None:
        self.started = threading.Event()
        self.go = threading.Event()
        self.student = ScriptedStudent(digest=digest, reply=lambda _: text, pause=self._pause)

    def _pause(self) -> None:
        self.started.set()
        assert self.go.wait(20)

    async def until_started(self) -> None:
        assert await asyncio.to_thread(self.started.wait, 20)


def test_requests_are_served_in_the_order_they_came() -> None:
    async def run() -> None:
        served: list[int] = []
        host = StudentHost(student=ScriptedStudent())

        def note(n: int) -> Generator[None, None, None]:
            served.append(n)
            yield

        async def one(n: int) -> None:
            await host.run(lambda _: note(n))

        await asyncio.gather(*(one(n) for n in range(20)))
        assert served == list(range(20))
        await host.close()

    asyncio.run(run())


def test_the_event_loop_stays_free_while_a_student_works() -> None:
    async def run() -> None:
        held = Held()
        host = StudentHost(student=held.student)
        answer = asyncio.ensure_future(host.run(whole))
        await held.until_started()  # the loop runs on although the student is held
        assert not answer.done()
        held.go.set()
        assert await answer == ("a", "one two three")

    asyncio.run(run())


def test_too_many_waiting_requests_are_refused_and_the_others_answered() -> None:
    async def run() -> None:
        held = Held()
        host = StudentHost(student=held.student, max_live=1, max_waiting=2)
        first = asyncio.ensure_future(host.run(whole))
        await held.until_started()
        waiting = [asyncio.ensure_future(host.run(whole)) for _ in range(2)]
        await asyncio.sleep(0)
        assert host.waiting == 2
        with pytest.raises(BusyError, match="2 requests wait already"):
            await host.run(whole)
        held.go.set()
        assert len(await asyncio.gather(first, *waiting)) == 3

    asyncio.run(run())


class Slow:
    """A student whose words come until it is told to end."""

    def __init__(self, digest: str = "a") -> None:
        self.started = threading.Event()
        self.student = ScriptedStudent(
            digest=digest, reply=lambda _: " ".join(["word"] * 50), pause=self._pause
        )

    def _pause(self) -> None:
        self.started.set()
        time.sleep(0.01)


@pytest.mark.parametrize("live", [1, 2])
def test_a_swap_waits_for_those_that_run_and_goes_before_those_that_wait(live: int) -> None:
    async def run() -> None:
        old = Slow().student
        new = ScriptedStudent(digest="b", reply=lambda _: "new")
        host = StudentHost(student=old, max_live=3)
        running = [asyncio.ensure_future(host.run(whole)) for _ in range(live)]
        swap = asyncio.ensure_future(host.swap(new))
        await until(lambda: host._incoming is not None)
        assert new.warmed == [Warmth("You run a home.", (), (("", "a"),))]
        assert host.student is old
        waiting = [asyncio.ensure_future(host.run(whole)) for _ in range(3)]
        assert {digest for digest, _ in await asyncio.gather(*running)} == {"a"}
        assert await asyncio.gather(*waiting) == [("b", "new")] * 3
        await swap
        assert old.closed
        assert not new.closed
        await host.close()
        assert new.closed

    asyncio.run(run())


def test_live_requests_take_turns_and_a_short_one_overtakes_a_long_one() -> None:
    async def run() -> None:
        order: list[str] = []
        texts = iter([" ".join(["long"] * 20), "short answer"])
        held = Held()
        student = held.student
        student.reply = lambda _: next(texts)
        host = StudentHost(student=student, max_live=2)

        async def ask(name: str) -> None:
            await host.run(whole)
            order.append(name)

        long = asyncio.ensure_future(ask("long"))
        await held.until_started()
        short = asyncio.ensure_future(ask("short"))
        await asyncio.sleep(0.01)
        third = asyncio.ensure_future(host.run(whole))
        await asyncio.sleep(0.01)
        assert host.waiting == 1
        third.cancel()
        held.go.set()
        await asyncio.gather(long, short)
        assert order == ["short", "long"]
        assert student.running == 0
        await host.close()

    asyncio.run(run())


def test_a_live_request_that_is_given_up_leaves_the_others_alone() -> None:
    async def run() -> None:
        held = Held(text=" ".join("abcdefghij"))
        host = StudentHost(student=held.student, max_live=3)
        first, given_up, last = (asyncio.ensure_future(host.run(whole)) for _ in range(3))
        await held.until_started()
        given_up.cancel()
        held.go.set()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert await first == await last == ("a", "a b c d e f g h i j")
        assert held.student.running == 0
        assert held.student.decoded <= 21
        await host.close()

    asyncio.run(run())


def test_no_request_fails_while_students_are_swapped_over_and_over() -> None:
    async def run() -> None:
        students = [ScriptedStudent(digest=str(n), reply=lambda _: "a b c d") for n in range(20)]
        host = StudentHost(student=students[0], max_waiting=200)
        swapping = asyncio.Event()

        async def ask_on() -> list[str]:
            seen = []
            while not swapping.is_set():
                digest, text = await host.run(whole)
                assert text == "a b c d"
                seen.append(digest)
            return seen

        asking = [asyncio.ensure_future(ask_on()) for _ in range(8)]
        for student in students[1:]:
            await asyncio.sleep(0.005)
            await host.swap(student)
        swapping.set()
        seen = await asyncio.gather(*asking)
        for digests in seen:
            assert digests == sorted(digests, key=int)  # nobody was sent back to an old student
        assert all(s.closed for s in students[:-1])
        assert not students[-1].closed

    asyncio.run(run())


def test_a_request_that_is_given_up_stops_decoding_before_the_next_one_starts() -> None:
    async def run() -> None:
        held = Held(text=" ".join("abcdefghij"))
        host = StudentHost(student=held.student, max_live=1)
        given_up = asyncio.ensure_future(host.run(whole))
        await held.until_started()
        following = asyncio.ensure_future(host.run(whole))
        given_up.cancel()
        await asyncio.sleep(0.01)
        given_up.cancel()  # an impatient canceller changes nothing
        await asyncio.sleep(0.01)
        assert not given_up.done()  # the student still works: its turn is not over
        held.go.set()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        assert held.student.decoded == 1
        assert (await following)[1] == "a b c d e f g h i j"

    asyncio.run(run())


def test_a_request_that_gives_up_waiting_leaves_the_queue() -> None:
    async def run() -> None:
        held = Held()
        host = StudentHost(student=held.student, max_live=1)
        first = asyncio.ensure_future(host.run(whole))
        await held.until_started()
        impatient = asyncio.ensure_future(host.run(whole))
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert host.waiting == 0
        held.go.set()
        await first
        await host.run(whole)

    asyncio.run(run())


def test_a_swap_that_is_given_up_in_time_does_not_happen() -> None:
    async def run() -> None:
        old, new = Slow().student, ScriptedStudent(digest="b")
        host = StudentHost(student=old)
        first = asyncio.ensure_future(host.run(whole))
        swap = asyncio.ensure_future(host.swap(new))
        await until(lambda: host._incoming is not None)
        late = asyncio.ensure_future(host.run(whole))
        await asyncio.sleep(0)
        assert host.waiting == 1
        swap.cancel()
        with pytest.raises(asyncio.CancelledError):
            await swap
        assert (await first)[0] == (await late)[0] == "a"
        assert not new.closed

    asyncio.run(run())


def test_a_host_that_closes_answers_what_it_took_and_takes_no_more() -> None:
    async def run() -> None:
        held = Held()
        host = StudentHost(student=held.student)
        taken = [asyncio.ensure_future(host.run(whole)) for _ in range(3)]
        await held.until_started()
        closing = asyncio.ensure_future(host.close())
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="stopping"):
            await host.run(whole)
        with pytest.raises(UnavailableError):
            await host.swap(ScriptedStudent())
        held.go.set()
        assert len(await asyncio.gather(*taken)) == 3
        await closing
        assert held.student.closed

    asyncio.run(run())


def test_requests_wait_for_the_successor_of_a_student_that_was_unloaded() -> None:
    async def run() -> None:
        first, second = Held("a"), Held("b")
        first.go.set()
        second.go.set()
        old, new = first.student, second.student
        host = StudentHost(student=old)
        await host.run(whole)
        await host.unload()
        assert old.closed
        asked = [asyncio.create_task(host.run(whole)) for _ in range(6)]
        await until(lambda: host.waiting == len(asked))
        await host.swap(new)
        assert {digest for digest, _ in await asyncio.gather(*asked)} == {"b"}
        assert new.warmed
        await host.close()
        assert new.closed

    asyncio.run(run())


def test_a_student_is_unloaded_after_the_requests_that_run() -> None:
    async def run() -> None:
        held = Held()
        host = StudentHost(student=held.student)
        asked = asyncio.create_task(host.run(whole))
        await held.until_started()
        unloading = asyncio.create_task(host.unload())
        late = asyncio.create_task(host.run(whole))
        await asyncio.sleep(0.05)
        assert not held.student.closed
        held.go.set()
        await unloading
        assert (await asked)[1] == "one two three"
        assert held.student.closed
        second = Held("b")
        second.go.set()
        await host.swap(second.student)
        assert (await late)[0] == "b"
        await host.close()

    asyncio.run(run())


def test_a_host_that_closes_without_a_student_refuses_those_that_wait() -> None:
    async def run() -> None:
        host = StudentHost(student=ScriptedStudent())
        await host.unload()
        asked = asyncio.create_task(host.run(whole))
        await until(lambda: host.waiting == 1)
        await host.close()
        with pytest.raises(UnavailableError, match="stopping"):
            await asked

    asyncio.run(run())
