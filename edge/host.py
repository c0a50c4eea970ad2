"""The student in service: one request at a time, first come first served, swapped in between.

The event loop stays free: a student works in a thread of its own. A request that is given up stops
decoding at the next token, and the student is not handed on before it has stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from protos.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from edge.student.runtime import Decoding, Token
    from protos.harness import Harness
    from protos.prompt import Message

T = TypeVar("T")
MAX_WAITING = 32
"""Requests that may wait; at two seconds each the last one waits a minute."""


class BusyError(UnavailableError):
    """Too many requests wait already."""


class Servable(Protocol):
    """What a host needs of :class:`edge.student.runtime.Student`."""

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

    def stream(self, messages: Sequence[Message], decoding: Decoding) -> Iterator[Token]:
        """Decode token by token."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


StudentT = TypeVar("StudentT", bound=Servable)


class StudentHost(Generic[StudentT]):
    """Holds the student in service. All methods belong to one event loop.

    Args:
        student: the first to serve; the host closes it in the end.
        max_waiting: requests that may wait behind the one that runs.
    """

    def __init__(self, *, student: StudentT, max_waiting: int = MAX_WAITING) -> None:
        self._student = student
        self._max_waiting = max_waiting
        self._waiting = 0
        self._turn = asyncio.Lock()  # first come, first served
        self._swapping = asyncio.Lock()
        self._incoming: tuple[StudentT, asyncio.Future[StudentT]] | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="student")
        self._closed = False

    @property
    def student(self) -> StudentT:
        """The student in service now; work with it only inside :meth:`run`."""
        return self._student

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return self._waiting

    async def run(self, work: Callable[[StudentT, threading.Event], T]) -> T:
        """Wait for a turn, then do ``work`` with the student in its thread.

        When the caller is cancelled, the event is set; ``work`` must look at it often and return.

        Raises:
            BusyError: too many wait already.
            UnavailableError: the host is closed.
        """
        self._refuse_if_closed()
        if self._turn.locked() and self._waiting >= self._max_waiting:
            msg = f"{self._waiting} requests wait already: ask again in a few seconds"
            raise BusyError(msg)
        self._waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self._waiting -= 1
        try:
            self._exchange()
            return await self._work(work)
        finally:
            self._exchange()
            self._turn.release()

    async def swap(self, new: StudentT) -> None:
        """Put ``new`` into service after the request that runs now, and close the old student.

        Requests that wait are answered by the new one. When the caller is cancelled before that,
        the old student stays and ``new`` remains the caller's.

        Raises:
            UnavailableError: the host is closed; ``new`` remains the caller's.
        """
        self._refuse_if_closed()
        async with self._swapping:
            self._refuse_if_closed()  # it may have closed while this swap waited for another
            done: asyncio.Future[StudentT] = asyncio.get_running_loop().create_future()
            self._incoming = (new, done)
            if not self._turn.locked():
                self._exchange()
            try:
                await asyncio.shield(done)
            finally:
                if done.done():
                    await asyncio.to_thread(done.result().close)
                else:
                    self._incoming = None

    async def close(self) -> None:
        """Take no more requests, let those that were taken finish, and close the student."""
        self._closed = True
        async with self._swapping, self._turn:
            await asyncio.to_thread(self._student.close)
        self._worker.shutdown()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            msg = "the device is stopping: ask again when it is back"
            raise UnavailableError(msg)

    def _exchange(self) -> None:
        """Between two requests: bring in the student that waits, if any."""
        if self._incoming is not None:
            new, done = self._incoming
            self._incoming = None
            done.set_result(self._student)
            self._student = new

    async def _work(self, work: Callable[[StudentT, threading.Event], T]) -> T:
        abandoned = threading.Event()
        running = asyncio.get_running_loop().run_in_executor(
            self._worker, work, self._student, abandoned
        )
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            abandoned.set()
            while not running.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([running])
            running.exception()  # retrieved: nobody waits for it any more
            raise
