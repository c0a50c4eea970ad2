"""Simulated people: they ask their home's device, and tell it what it should have said."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from edge.student.runtime import greedy
from protos.prompt import Message, chat

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloud.demo.commands import Command
    from cloud.demo.homes import Home
    from edge.student.runtime import Student

_TIMEOUT_S = 120
_OK = 200


@dataclass(frozen=True)
class Asked:
    """A command, and what the device said to it. ``seconds`` is until the whole answer was here."""

    command: Command
    answer: str
    completion: str
    seconds: float

    @property
    def right(self) -> bool:
        """Whether the answer is the right one, to the letter."""
        return self.answer == self.command.answer


class Household:
    """The people of one home and their device.

    ``failed`` counts requests that got no answer, for whatever reason.
    """

    def __init__(self, home: Home, state: Path) -> None:
        self.home = home
        self.device = f"home-{home.name.lower()}"
        self.state = state
        self.requests = 0
        self.failed = 0
        self._client: httpx.AsyncClient | None = None

    def connect(self, api: str) -> None:
        """Use the device at this address from now on."""
        self._client = httpx.AsyncClient(base_url=api, timeout=_TIMEOUT_S)

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    async def ask(self, command: Command, *, store: bool = True) -> Asked | None:
        """Say a command; None when the device gave no answer.

        With ``store`` false the device does not watch the answer for drift: it is a test.
        """
        body = {"messages": [{"role": "user", "content": command.text}], "store": store}
        began = time.monotonic()
        reply = await self._post("/v1/chat/completions", body)
        if reply is None:
            return None
        return Asked(
            command,
            reply["choices"][0]["message"]["content"],
            reply["id"],
            time.monotonic() - began,
        )

    async def judge(self, asked: Asked) -> None:
        """Accept a right answer, correct a wrong one."""
        body: dict[str, Any] = {"completion_id": asked.completion}
        body |= {"accepted": True} if asked.right else {"correction": asked.command.answer}
        await self._post("/v1/feedback", body)

    async def health(self) -> dict[str, Any]:
        """What the device says of itself.

        Raises:
            httpx.HTTPError: it cannot be asked.
        """
        assert self._client is not None  # noqa: S101  # connected at the start
        reply = await self._client.get("/healthz")
        reply.raise_for_status()
        health: dict[str, Any] = reply.json()
        return health

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        assert self._client is not None  # noqa: S101  # connected at the start
        self.requests += 1
        try:
            reply = await self._client.post(path, json=body)
            if reply.status_code == _OK:
                value: dict[str, Any] = reply.json()
                return value
        except httpx.HTTPError:
            pass
        self.failed += 1
        return None


def exact_match(student: Student, commands: Sequence[Command]) -> int:
    """How many commands a student answers to the letter, greedily and without working memory."""
    chats = [chat(student.harness.system, [Message("user", c.text)]) for c in commands]
    decoding = greedy(student.harness)
    answers = student.answer_all(chats, decoding.max_tokens, decoding.grammar)
    return sum(a.text == c.answer for a, c in zip(answers, commands, strict=True))
