"""Answer chats with a student bundle through ONNX Runtime."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from tokenizers import Tokenizer

from edge.student import bundle
from edge.student.decode import SLICE, Run
from edge.student.engine import Engine, open_session
from edge.student.guide import GrammarError, Guides, schema_grammar
from edge.student.lookup import Guesser, PastAnswers, Spelling
from edge.student.prefix import PrefixCache
from edge.student.tokens import Answer, Decoding, Emission, Token, surprise
from protos.errors import ContextLengthError, IntegrityError
from protos.prompt import IM_START, Message, render

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import onnxruntime as ort

    from edge.student.engine import Floats
    from protos.harness import Harness

__all__ = ["Answer", "Decoding", "Student", "Token", "Warmth", "greedy", "surprise"]

log = logging.getLogger("anabranch.student")

_CACHE_BYTES = 96 * 1024 * 1024
_WARMED = 512  # tokens; a student that is warmed competes with the one that serves


@dataclass(frozen=True)
class Warmth:
    """What makes a student fast, by content: it outlives the weights.

    Attributes:
        system: the harness's system prompt.
        heads: messages at the beginning of prompts, the latest first.
        answers: of the past with what was asked, oldest first.
    """

    system: str
    heads: tuple[tuple[Message, ...], ...]
    answers: tuple[tuple[str, str], ...]


def greedy(harness: Harness) -> Decoding:
    """How a harness has its requests answered: what devices do, and what a gate must do."""
    guided = harness.guided and harness.schema is not None
    return Decoding(
        max_tokens=harness.max_tokens,
        grammar=schema_grammar(harness.schema or {}) if guided else None,
    )


class Student:
    """A student bundle, open. One thread at a time; answers may take turns (``edge/host.py``)."""

    def __init__(self, folder: Path, session: ort.InferenceSession, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.digest = bundle.digest(folder)
        self.harness = bundle.read_harness(folder)
        self.tokenizer = tokenizer
        self.config = bundle.read_config(folder)
        self.context_length: int = self.config["context_length"]
        self.guides = Guides(
            folder / "tokenizer.json",
            vocabulary=self.config["vocabulary"],
            eos=self.config["eos"],
        )
        self._eos = frozenset(self.config["eos"])
        self._engine = Engine(session, self.config)
        self._prefixes = PrefixCache(_CACHE_BYTES)
        self._spelling = _spelling(tokenizer)
        self._past = PastAnswers(self._spelling)

    @classmethod
    def open(cls, folder: Path, *, threads: int = 2) -> Self:
        """Open a bundle.

        Raises:
            IntegrityError: a file is missing, or the runtime cannot load the graph.
        """
        try:
            session = open_session(folder, threads=threads)
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return cls(folder, session, tokenizer)
        except IntegrityError:
            raise
        except Exception as error:  # the runtime and tokenizers raise many unrelated kinds
            msg = f"the student in {folder} cannot be opened: {error}"
            raise IntegrityError(msg) from error

    def close(self) -> None:
        """Free the session's memory; the student answers no more."""
        self._engine.close()
        self._prefixes = PrefixCache(0)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat, up to where the answer begins."""
        return self._spelling.encode(render(messages))

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """How many tokens a chat takes before its answer."""
        return len(self.encode(messages))

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; none for special tokens."""
        return self.guides.bytes_of(token)

    def begin(self, messages: Sequence[Message], decoding: Decoding) -> Run:
        """Begin an answer; no pass is made yet.

        Raises:
            ContextLengthError: the prompt does not fit.
            GrammarError: the grammar cannot guide.
        """
        ids = self.encode(messages)
        room = self.context_length - len(ids)
        if room < 1:
            msg = (
                f"the prompt takes {len(ids)} tokens and the student's context holds "
                f"{self.context_length} with the answer: shorten the prompt"
            )
            raise ContextLengthError(msg)
        ahead = decoding.speculate and self._engine.exact
        head, asked = messages[:-1], messages[-1].content if messages else ""

        def prefilled(run: Run) -> None:
            self._prefixes.keep_head(run.chat, self._head_tokens(ids), head)

        def ended(run: Run) -> None:
            if run.finish_reason is not None:
                self._past.add(asked, run.decoded)
            self._prefixes.keep_latest(run.chat)

        return Run(
            engine=self._engine,
            chat=self._prefixes.take(ids, self._engine.open_chat()),
            prompt=ids,
            limit=min(decoding.max_tokens, room),
            decoding=decoding,
            guide=self.guides.follow(decoding.grammar) if decoding.grammar else None,
            guesser=Guesser(ids, asked, self._past) if ahead else None,
            eos=self._eos,
            emission=Emission(self._text, decoding.stop),
            on_prefilled=prefilled,
            on_end=ended,
        )

    def stream(self, messages: Sequence[Message], decoding: Decoding) -> Iterator[Token]:
        """Decode token by token; the end-of-answer token is not yielded.

        Raises:
            ContextLengthError: before the first token, when the prompt does not fit.
            GrammarError: the grammar cannot guide.
        """
        run = self.begin(messages, decoding)
        try:
            while not run.done:
                yield from run.advance()
        finally:
            run.close()

    def answer(self, messages: Sequence[Message], decoding: Decoding) -> Answer:
        """Decode a whole answer.

        Raises:
            ContextLengthError: the prompt does not fit.
            GrammarError: the grammar cannot guide.
        """
        run = self.begin(messages, decoding)
        tokens: list[Token] = []
        while not run.done:
            tokens += run.advance()
        return Answer(
            text="".join(t.text for t in tokens),
            surprise=surprise(tokens),
            finish_reason=run.finish_reason or "stop",
            prompt_tokens=run.prompt_tokens,
            completion_tokens=len(tokens),
        )

    def answer_all(
        self, chats: Sequence[Sequence[Message]], max_tokens: int, grammar: str | None = None
    ) -> list[Answer]:
        """Greedy answers to many chats, made as a device makes them: what the gate uses.

        Raises:
            ContextLengthError: a prompt does not fit.
            GrammarError: the grammar cannot guide.
        """
        decoding = Decoding(max_tokens=max_tokens, grammar=grammar)
        return [self.answer(messages, decoding) for messages in chats]

    def logits(self, ids: Sequence[int], first: int) -> Floats:
        """Teacher-forced logits [len(ids) - first, vocabulary] at ``first`` and after."""
        return self._engine.forward(self._engine.open_chat(), ids, range(first, len(ids))).copy()

    def warmth(self) -> Warmth:
        """What the next student should be warmed with."""
        answers = tuple((asked, self._text(ids)) for asked, ids in self._past)
        return Warmth(self.harness.system, self._prefixes.heads, answers)

    def warm(self, warmth: Warmth) -> None:
        """Fill the caches with what another student's held, so that the first requests are fast.

        Its states are of other weights and worth nothing here; its contents are read again, the
        harness's system prompt replaced by the own one, up to some hundred tokens.
        """
        if self._engine.exact:
            _ = self._engine.worth  # measured now: the first request would wait for it
        self._compile()
        own = [self._swapped(m, warmth.system) for m in warmth.heads]
        for asked, text in warmth.answers:
            self._past.add(asked, self._spelling.encode(text))
        left = _WARMED
        for head in own:
            ids = self._spelling.encode(render(head, answer=False))
            left -= len(ids)
            if left < 0:
                break
            chat = self._prefixes.take(ids, self._engine.open_chat())
            rest = ids[len(chat.ids) :]
            for start in range(0, len(rest), SLICE):
                part = rest[start : start + SLICE]
                self._engine.forward(chat, part, [len(part) - 1])
            self._prefixes.keep_head(chat, len(ids), head)

    def _compile(self) -> None:
        """Compile the harness's grammar: half a second that the first request would wait for."""
        try:
            grammar = greedy(self.harness).grammar
            if grammar is not None:
                self.guides.follow(grammar)
        except GrammarError as error:  # each request will say so
            log.warning("the harness's schema: %s", error)

    def _swapped(self, head: Sequence[Message], system: str) -> list[Message]:
        old, new = Message("system", system), Message("system", self.harness.system)
        return [new if m == old else m for m in head]

    def _head_tokens(self, ids: list[int]) -> int:
        """Tokens before the message that is to be answered."""
        mark = self.tokenizer.token_to_id(IM_START)
        starts = [i for i, token in enumerate(ids) if token == mark]
        return starts[-2] if len(starts) > 1 else 0

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _spelling(tokenizer: Tokenizer) -> Spelling:
    """Of the tokenizer alone: a student that held itself would stay in memory after a swap."""

    @functools.cache
    def decode(token: int) -> str:
        return str(tokenizer.decode([token], skip_special_tokens=True))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return Spelling(decode, encode)
