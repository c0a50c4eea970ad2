"""Demonstrations as the token sequences that learners see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from tokenizers import Tokenizer

from cloud.learners.course import Lesson
from cloud.learners.packing import Example
from edge.student.bundle import read_config, read_harness
from protos.prompt import Message, Shown, chat, render

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloud.learners.config import LearnerConfig

# The teacher's prompt of the paper (Shenfeld et al., arXiv 2601.19897, section 3).
_PROSE = (
    "{request}\n\nThis is an example for a response to the question:\n{answer}\n\n"
    "Now answer with a response of your own, including the thinking process:"
)


class Encoder:
    """Turns chats and answers into the learners' token sequences."""

    def __init__(self, tokenizer: Tokenizer, system: str, eos: int) -> None:
        self._tokenizer = tokenizer
        self._system = system
        self._eos = eos

    @classmethod
    def of(cls, bundle: Path, system: str | None = None) -> Self:
        """The encoder of a bundle's tokenizer, with the bundle's system prompt or another."""
        tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        harness = read_harness(bundle)
        end = read_config(bundle)["eos"][0]
        return cls(tokenizer, harness.system if system is None else system, end)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def example(
        self, messages: Sequence[Message], answer: str, shown: Sequence[Shown] = ()
    ) -> Example:
        """A chat with its answer; the end-of-answer token belongs to the answer."""
        whole = self._ids(render(chat(self._system, messages, shown)))
        prefix = self._ids(render([Message("system", self._system)], answer=False))
        if whole[: len(prefix)] != prefix:  # the request brought its own system message
            prefix = ()
        return Example(prefix, whole[len(prefix) :], (*self._ids(answer), self._eos))

    def lesson(self, shown: Shown, config: LearnerConfig) -> Lesson:
        """A demonstration as student and teacher see it.

        Shown twice as turns, the teacher copies it always; shown once, in nine cases of ten; from
        prose, a model of 135M never does.
        """
        student = self.example(shown.messages, shown.answer)
        if config.teacher_prompt == "turns":
            teacher = self.example(shown.messages, shown.answer, [shown] * config.shown)
        else:
            *before, last = shown.messages
            asked = Message(last.role, _PROSE.format(request=last.content, answer=shown.answer))
            teacher = self.example((*before, asked), shown.answer)
        return Lesson(student, teacher)
