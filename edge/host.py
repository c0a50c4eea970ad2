"""The student in service: some requests at a time take turns, others wait, swaps come in between.

The event loop stays free: a student works in a thread of its own. Requests that are live give way
after each pass of the student, so that a short one need not wait for a long one. A request that is
given up stops after the pass under way. Before a swap no request begins; those that have begun end
on the student on which they began.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from protos.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from edge.student.runtime import Warmth
    from edge.student.tokens import Decoding, Token
    from protos.harness import Harness
    from protos.prompt import Message

T = TypeVar("T")
MAX_LIVE = 4
"""Requests that take turns; each holds keys and values of its own."""
MAX_WAITING = 32
"""Requests that may wait; at two seconds each the last one waits a minute."""


class BusyError(UnavailableError):
    """Too many requests wait already."""


class Answering(Protocol):
    """An answer in the making (``edge/student/decode.py``)."""

    @property
    def done(self) -> bool:
        """Whether all of it was given."""
        ...

    @property
    def finish_reason(self) -> str | None:
        """``stop`` or ``length``; None before the end."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        ...

    def advance(self) -> Sequence[Token]:
        """Make one pass."""
        ...

    def close(self) -> None:
        """Nobody wants more of it."""
        ...


class Servable(Protocol):
    """What a host and its requests need of :class:`edge.student.runtime.Student`."""

    @property
    def digest(self) -> str:
        """Digest of its bundle."""
        ...

    @property
    def harness(self) -> Harness:
        """Its harness."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of a prompt with its answer."""
        ...

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a prompt."""
        ...

    def begin(self, messages: Sequence[Message], decoding: Decoding) -> Answering:
        """Begin an answer."""
        ...

    def bytes_of(self, token: int) -> bytes:
        """Bytes of a token."""
        ...

    def warmth(self) -> Warmth:
        """What makes it fast, by content."""
        ...

    def warm(self, warmth: Warmth) -> None:
        """Become fast at what another was fast at."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


StudentT = TypeVar("StudentT", bound=Servable)


@dataclass(frozen=True)
class _Ended(Generic[T]):
    value: T


class StudentHost(Generic[StudentT]):
    """Holds the student in service. All methods belong to one event loop.

    Args:
        student: the first to serve; the host closes it in the end.
        max_live: requests that take turns.
        max_waiting: requests that may wait behind those.
    """

    def __init__(
        self, *, student: StudentT, max_live: int = MAX_LIVE, max_waiting: int = MAX_WAITING
    ) -> None:
        self._student = student
        self._max_live = max_live
        self._max_waiting = max_waiting
        self._live = 0
        self._queue: deque[asyncio.Future[None]] = deque()  # first come, first served
        self._idle = asyncio.Event()
        self._idle.set()
        self._swapping = asyncio.Lock()
        self._incoming: tuple[StudentT, asyncio.Future[StudentT]] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")
        self._closed = False
        self._away: Warmth | None = None  # of a student that was unloaded and has no successor yet
        self._leaving: asyncio.Future[None] | None = None

    @property
    def student(self) -> StudentT:
        """The student in service now; work with it only inside :meth:`run`."""
        return self._student

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    async def run(self, work: Callable[[StudentT], Generator[None, None, T]]) -> T:
        """Wait for a place, then do ``work`` with the student in its thread.

        ``work`` gives way whenever it yields; others go on then. When the caller is cancelled,
        ``work`` is closed where it yields next.

        Raises:
            BusyError: too many wait already.
            UnavailableError: the host is closed.
        """
        self._refuse_if_closed()
        await self._enter()
        try:
            return await self._work(work(self._student))
        finally:
            self._live -= 1
            self._admit()

    async def swap(self, new: StudentT) -> None:
        """Put ``new`` into service after the requests that run now, and close the old student.

        The new one first reads what the old one's caches held, so that it is not slow at first.
        Requests that wait are answered by it. When the caller is cancelled before that, the old
        student stays and ``new`` remains the caller's.

        Raises:
            UnavailableError: the host is closed; ``new`` remains the caller's.
        """
        self._refuse_if_closed()
        async with self._swapping:
            self._refuse_if_closed()  # it may have closed while this swap waited for another
            loop = asyncio.get_running_loop()
            warmth = self._away
            if warmth is None:
                warmth = await loop.run_in_executor(self._worker, self._student.warmth)
            await asyncio.to_thread(new.warm, warmth)
            self._refuse_if_closed()
            if self._away is not None:  # the old one is closed already
                self._student, self._away = new, None
                self._admit()
                return
            done: asyncio.Future[StudentT] = loop.create_future()
            self._incoming = (new, done)
            self._admit()
            try:
                await asyncio.shield(done)
            finally:
                if done.done():
                    await asyncio.to_thread(done.result().close)
                else:
                    self._incoming = None
                    self._admit()

    async def unload(self) -> None:
        """Close the student after the requests that run now; others wait until :meth:`swap`.

        For devices without room for two students at once.

        Raises:
            UnavailableError: the host is closed.
        """
        self._refuse_if_closed()
        async with self._swapping:
            self._refuse_if_closed()
            if self._away is not None:
                return
            loop = asyncio.get_running_loop()
            self._leaving = loop.create_future()
            self._admit()
            try:
                await asyncio.shield(self._leaving)
                self._away = await loop.run_in_executor(self._worker, self._student.warmth)
            finally:
                self._leaving = None
                self._admit()
            await asyncio.to_thread(self._student.close)

    async def close(self) -> None:
        """Take no more requests, let those that were taken finish, and close the student."""
        self._closed = True
        async with self._swapping:
            if self._away is not None:
                self._turn_away()
            await self._idle.wait()
            if self._away is None:
                await asyncio.to_thread(self._student.close)
        self._worker.shutdown()

    def _turn_away(self) -> None:
        """Refuse those that wait for a student that will not come."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_exception(UnavailableError("the device is stopping: ask again later"))
        self._admit()

    def _held(self) -> bool:
        """Whether no request may begin: a student comes or goes, or there is none."""
        return any(x is not None for x in (self._incoming, self._leaving, self._away))

    def _refuse_if_closed(self) -> None:
        if self._closed:
            msg = "the device is stopping: ask again when it is back"
            raise UnavailableError(msg)

    async def _enter(self) -> None:
        """Become live, at once or when others have ended."""
        full = self._live >= self._max_live or self._held()
        if full and len(self._queue) >= self._max_waiting:
            msg = f"{len(self._queue)} requests wait already: ask again in a few seconds"
            raise BusyError(msg)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._queue.remove(turn)
            else:  # the place came at the moment when nobody wanted it any more
                self._live -= 1
            self._admit()
            raise

    def _admit(self) -> None:
        """Between two requests: bring in the student that waits, then requests that wait."""
        if self._incoming is not None and not self._live:
            new, done = self._incoming
            self._incoming = None
            done.set_result(self._student)
            self._student = new
        if self._leaving is not None and not self._live and not self._leaving.done():
            self._leaving.set_result(None)
        for turn in [t for t in self._queue if not t.done()]:
            if self._held() or self._live >= self._max_live:
                break
            self._queue.remove(turn)
            self._live += 1
            turn.set_result(None)
        if self._live or self._queue:
            self._idle.clear()
        else:
            self._idle.set()

    async def _work(self, work: Generator[None, None, T]) -> T:
        abandoned = threading.Event()
        loop = asyncio.get_running_loop()

        def turn() -> _Ended[T] | None:
            """Work until others want their turn; they are served in the executor's order."""
            while not abandoned.is_set():
                try:
                    next(work)
                except StopIteration as end:
                    return _Ended(end.value)
                if self._live > 1 or self._swapping.locked():
                    break
            return None

        while True:
            running = loop.run_in_executor(self._worker, turn)
            try:
                ended = await asyncio.shield(running)
            except asyncio.CancelledError:
                abandoned.set()
                await _finished(running)
                await _finished(loop.run_in_executor(self._worker, work.close))
                raise
            if ended is not None:
                return ended.value


async def _finished(running: asyncio.Future[Any]) -> None:
    """Wait for the student's thread, however often the caller is cancelled."""
    while not running.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([running])
    running.exception()  # retrieved: nobody waits for it any more
