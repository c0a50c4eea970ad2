"""The one prompt of the whole system.

A device with a working memory and the teacher of self-distillation are the same model prompted the
same way: demonstrations stand as earlier turns of the chat. Edge and cloud both build their prompts
here and nowhere else. At 135M parameters chat turns are what makes a teacher: the paper's prose
("this is an example for a response ...") was copied 0% of the time, a chat turn 90-95%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROLES = ("system", "user", "assistant", "tool")
ASKING = ("user", "tool")
"""Roles whose message may be answered."""

IM_START, IM_END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Message:
    """One message of a chat; ``role`` is one of :data:`ROLES`."""

    role: str
    content: str

    def __post_init__(self) -> None:
        """Refuse roles that no prompt can hold, and control tokens smuggled in as text."""
        if self.role not in ROLES:
            msg = f"role {self.role!r} is not one of {', '.join(ROLES)}"
            raise InvalidInputError(msg)
        if IM_START in self.content or IM_END in self.content:
            msg = f"a message must not contain {IM_START} or {IM_END}; remove them from the text"
            raise InvalidInputError(msg)


@dataclass(frozen=True)
class Shown:
    """A demonstration as the prompt shows it: what was asked, and the right answer."""

    messages: tuple[Message, ...]
    answer: str


def chat(system: str, messages: Sequence[Message], shown: Iterable[Shown] = ()) -> list[Message]:
    """Put demonstrations before a request, as earlier turns of the same chat.

    A system message in ``messages`` replaces ``system`` (the harness's).

    >>> lamp = Shown((Message("user", "lamp on"),), '{"name":"on"}')
    >>> [m.content for m in chat("You run a home.", [Message("user", "lamp off")], [lamp])]
    ['You run a home.', 'lamp on', '{"name":"on"}', 'lamp off']
    """
    own = [m for m in messages if m.role != "system"]
    if not own or own[-1].role not in ASKING:
        msg = "the last message must be the user's or a tool's: nothing to answer otherwise"
        raise InvalidInputError(msg)
    heads = [m for m in messages if m.role == "system"] or (
        [Message("system", system)] if system else []
    )
    turns = [
        m
        for s in shown
        for m in (*(t for t in s.messages if t.role != "system"), Message("assistant", s.answer))
    ]
    return [*heads, *turns, *own]


def render(messages: Iterable[Message], *, answer: bool = True) -> str:
    r"""ChatML text of a chat; with ``answer`` it ends where the assistant's answer begins.

    >>> render([Message("user", "hi")])
    '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'
    """
    text = "".join(f"{IM_START}{m.role}\n{m.content}{IM_END}\n" for m in messages)
    return text + (f"{IM_START}assistant\n" if answer else "")
