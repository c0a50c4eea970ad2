"""Virtual time, and the lines between devices and the cloud."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

T = TypeVar("T")


class DownError(Exception):
    """The other side's process is not there."""


class Agenda:
    """What happens when: callables in the order of their times, then of their planning."""

    def __init__(self, now: float) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        """Plan ``act``."""
        self._planned += 1
        heapq.heappush(self._heap, (self.now + seconds, self._planned, act))

    def next(self, until: float) -> bool:
        """Let the next thing happen; False when there is none before ``until``."""
        if not self._heap or self._heap[0][0] > until:
            self.now = max(self.now, until)
            return False
        self.now, _, act = heapq.heappop(self._heap)
        act()
        return True


@dataclass
class Line:
    """One device's way to the cloud. Times are in seconds, the others are probabilities."""

    up: bool = True
    delay: float = 0.3
    loss: float = 0.0
    duplicate: float = 0.0


class Network:
    """Messages that come late, twice, in another order, or not at all."""

    def __init__(self, agenda: Agenda, random: Random) -> None:
        self._agenda = agenda
        self._random = random

    def delay(self, line: Line) -> float:
        """Of one message: mostly around the line's, now and then ten times as long."""
        random = self._random.random
        return line.delay * (10.0 * random() if random() < 0.05 else 0.2 + random())

    def send(self, line: Line, deliver: Callable[[], None]) -> None:
        """One message, either way."""
        for _ in range(2 if line.duplicate and self._random.random() < line.duplicate else 1):
            if line.up and self._random.random() >= line.loss:
                self._agenda.after(self.delay(line), lambda: deliver() if line.up else None)

    def call(
        self,
        line: Line,
        serve: Callable[[], T],
        *,
        then: Callable[[T], None],
        failed: Callable[[], None],
        timeout: float = 10.0,
    ) -> None:
        """A request and its reply. Exactly one of ``then`` and ``failed`` is called.

        ``serve`` may be called although the call fails, and may be called twice.
        """
        settled = False

        def settle(act: Callable[[], None]) -> None:
            nonlocal settled
            if not settled:
                settled = True
                act()

        def arrive() -> None:
            try:
                reply = serve()
            except DownError:
                settle(failed)
                return
            self.send(line, lambda: settle(lambda: then(reply)))

        self.send(line, arrive)
        self._agenda.after(timeout, lambda: settle(failed))
