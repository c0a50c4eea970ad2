"""A student in memory whose answers are a function of its prompt, and a device around it."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from edge.api.app import create_app
from edge.api.service import Assistant, Identity
from edge.drift.monitor import DriftConfig, DriftMonitor
from edge.host import StudentHost
from edge.link.outbox import Outbox
from edge.memory.store import Memory
from edge.metrics import DeviceMetrics
from edge.student.runtime import Token, Warmth
from protos.errors import ContextLengthError
from protos.harness import Harness
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from starlette.applications import Starlette

    from edge.student.runtime import Decoding
    from protos.prompt import Message

NOW = 1_800_000_000.0


def echo(messages: Sequence[Message]) -> str:
    """Answer what stands before the request, as a teacher's pupil does."""
    return messages[-2].content if messages[-2].role == "assistant" else "I do not know"


@dataclass
class ScriptedStudent:
    """Words are tokens. ``pause`` is called in the student's thread before each of them."""

    digest: str = "a" * 64
    reply: Callable[[Sequence[Message]], str] = echo
    harness: Harness = field(default_factory=lambda: Harness(system="You run a home."))
    context_length: int = 200
    logprob: float = -0.25
    pause: Callable[[], object] = lambda: None
    prompts: list[list[Message]] = field(default_factory=list)
    decodings: list[Decoding] = field(default_factory=list)
    decoded: int = 0
    closed: bool = False
    running: int = 0
    warmed: list[Warmth] = field(default_factory=list)
    _busy: threading.Lock = field(default_factory=threading.Lock)

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        return sum(len(m.content.split()) for m in messages)

    def begin(self, messages: Sequence[Message], decoding: Decoding) -> ScriptedRun:
        size = self.prompt_tokens(messages)
        if size >= self.context_length:
            msg = f"the prompt takes {size} tokens and the context holds {self.context_length}"
            raise ContextLengthError(msg)
        self.prompts.append(list(messages))
        self.decodings.append(decoding)
        limit = min(decoding.max_tokens, self.context_length - size)
        self.running += 1
        return ScriptedRun(self, self.reply(messages).split(" "), limit, size)

    def bytes_of(self, token: int) -> bytes:
        return f"<{token}>".encode()

    def warmth(self) -> Warmth:
        assert not self.closed
        return Warmth(self.harness.system, (), (("", self.digest),))

    def warm(self, warmth: Warmth) -> None:
        self.warmed.append(warmth)

    def close(self) -> None:
        assert not self.running, "closed in the middle of a request"
        self.closed = True


class ScriptedRun:
    """Says one word a pass."""

    def __init__(
        self, student: ScriptedStudent, words: list[str], limit: int, prompt_tokens: int
    ) -> None:
        self._student = student
        self._words = words[:limit]
        self._said = 0
        self._open = True
        self._last = "length" if len(words) >= limit else "stop"
        self.prompt_tokens = prompt_tokens

    @property
    def done(self) -> bool:
        return self._said == len(self._words)

    @property
    def finish_reason(self) -> str | None:
        return self._last if self.done else None

    def advance(self) -> list[Token]:
        assert self._student._busy.acquire(blocking=False), "two passes at once"
        try:
            self._student.pause()
            assert not self._student.closed, "a closed student was used"
            i, word = self._said, self._words[self._said]
            self._student.decoded += 1
            self._said += 1
            return [Token(i, word if i == 0 else f" {word}", self._student.logprob)]
        finally:
            self._student._busy.release()

    def close(self) -> None:
        self._student.running -= self._open
        self._open = False


class Device:
    """Everything of an agent but its network: real memory, outbox and drift monitor."""

    def __init__(
        self,
        folder: Path,
        student: ScriptedStudent | None = None,
        *,
        max_live: int = 4,
        max_waiting: int = 32,
    ) -> None:
        self.registry = CollectorRegistry()
        self.metrics = DeviceMetrics(self.registry)
        self.student = student or ScriptedStudent()
        self.host = StudentHost(student=self.student, max_live=max_live, max_waiting=max_waiting)
        self.memory = Memory(path=folder / "memory.sqlite")
        self.outbox = Outbox(folder / "outbox.sqlite", clock=lambda: NOW)
        self.drift = DriftMonitor(config=DriftConfig())
        self.woken = 0
        self.assistant = Assistant(
            identity=Identity("home", "kitchen-1"),
            host=self.host,
            memory=self.memory,
            drift=self.drift,
            outbox=self.outbox,
            wake=self._wake,
            metrics=self.metrics,
            clock=lambda: NOW,
            random=random.Random(0),
        )
        self.app: Starlette = create_app(assistant=self.assistant, metrics=self.metrics)

    def _wake(self) -> None:
        self.woken += 1

    def demonstrations(self) -> list[device_pb2.Demonstration]:
        """Evidence that waits in the outbox."""
        return [
            device_pb2.Demonstration.FromString(item.payload)
            for item in self.outbox.pending(1000)
            if item.kind == "demonstration"
        ]

    def drift_reports(self) -> list[device_pb2.DriftReport]:
        """Alarms that wait in the outbox."""
        return [
            device_pb2.DriftReport.FromString(item.payload)
            for item in self.outbox.pending(1000)
            if item.kind == "drift"
        ]

    def value(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return self.registry.get_sample_value(name, labels) or 0.0
