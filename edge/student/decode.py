"""One answer in the making: each pass takes in what is certain and what is guessed.

A pass holds, in this order: the rest of the prompt or the latest token; tokens that the grammar
forces; tokens that are guessed to follow. What a row of the pass chooses is certain; as long as
guesses agree with it their rows count, too, and one pass yields several tokens. The answer is that
of one pass a token, to the token: see ``edge/student/engine.py`` for why rows are the same in both.
Where they are not the same (:attr:`Engine.exact`), every token gets a pass of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge.student.guide import GrammarError
from edge.student.prefix import shared
from edge.student.tokens import Token, choose, likeliest, logprob_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

    from edge.student.engine import Engine, Floats, KeyValues
    from edge.student.guide import Guide
    from edge.student.lookup import Guesser
    from edge.student.tokens import Decoding, Emission

SLICE = 64
"""Tokens of a prompt that a pass takes in, so that other requests need not wait for all of it."""


class Run:
    """Decodes one answer, a pass at a time.

    Args:
        engine: makes the passes.
        chat: keys and values of a beginning of ``prompt``, but not of all of it.
        prompt: tokens of the prompt.
        limit: of the answer's tokens.
        decoding: how to choose.
        guide: of the answer; None where it is free.
        guesser: None: nothing is guessed.
        eos: tokens that end an answer.
        emission: makes text of tokens.
        on_prefilled: called once when ``chat`` holds the prompt.
        on_end: called once when the answer has ended or was given up.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        chat: KeyValues,
        prompt: Sequence[int],
        limit: int,
        decoding: Decoding,
        guide: Guide | None,
        guesser: Guesser | None,
        eos: AbstractSet[int],
        emission: Emission,
        on_prefilled: Callable[[Run], None],
        on_end: Callable[[Run], None],
    ) -> None:
        self.prompt = prompt
        self.chat = chat
        self.decoded: list[int] = []
        self.finish_reason: str | None = None
        self._engine = engine
        self._limit = limit
        self._decoding = decoding
        self._guide = guide
        self._guesser = guesser
        self._eos = eos
        self._emission = emission
        self._on_prefilled = on_prefilled
        self._on_end = on_end
        self._closed = self._prefilled = False
        self._rng = np.random.default_rng(decoding.seed)
        # Forced tokens get rows only where somebody asks for their log-probabilities.
        self._fast = engine.exact and decoding.top_logprobs is None
        self._ready: list[Token] = []
        self._todo = [*prompt[len(chat.ids) :], *self._force()]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def done(self) -> bool:
        """Whether the answer has ended, and all of it was given."""
        return self.finish_reason is not None and not self._ready

    def advance(self) -> list[Token]:
        """Make one pass; returns the tokens that may be shown after it, possibly none.

        Raises:
            GrammarError: the grammar turned out too complex.
        """
        if self.finish_reason is None:
            try:
                self._pass()
            except BaseException:
                self._closed = True  # what the chat holds is not certain
                raise
        if self.finish_reason is not None:
            self.close()
        ready, self._ready = self._ready, []
        return ready

    def close(self) -> None:
        """The answer has ended, or nobody wants it any more."""
        if not self._closed:
            self._closed = True
            self._on_end(self)

    def _pass(self) -> None:
        if len(self._todo) > SLICE:
            self._engine.forward(self.chat, self._todo[:SLICE], [SLICE - 1])
            del self._todo[:SLICE]
            return
        draft, forced = self._draft()
        certain = len(self._todo)
        rows = [i for i in range(len(draft) + 1) if not (self._fast and i in forced)]
        logits = self._engine.forward(
            self.chat, [*self._todo, *draft], [certain - 1 + i for i in rows]
        )
        length = len(self.chat.ids) - len(draft)
        if not self._prefilled:
            self._prefilled = True
            self._on_prefilled(self)
        agreed = self._walk(dict(zip(rows, logits, strict=True)), draft)
        self.chat.truncate(length + agreed)

    def _walk(self, rows: dict[int, Floats], draft: list[int]) -> int:
        """Choose along the rows while the draft agrees; returns how much of it did."""
        at = 0
        while True:
            certain = self._choose(rows[at])
            same = shared(certain, draft[at:])
            at += same
            if self.finish_reason is not None or same < len(certain):
                self._todo = certain[same:]
                return at

    def _draft(self) -> tuple[list[int], set[int]]:
        """Tokens that may come next, and which of them, by position, the grammar would force."""
        draft: list[int] = []
        forced: set[int] = set()
        room = self._limit - len(self.decoded) - 1  # the last row of a pass gives one for nothing
        if self._guesser is None or room < 1:
            return draft, forced
        guide, likely, ahead = self._guide, 1.0, 0
        while len(draft) < room and not (guide and guide.complete):
            more, share = self._guess(draft)
            if not more:
                break
            must: list[int] = []
            if guide:
                guide.consume(more)
                must = guide.forced()
                guide.consume(must)
            ahead += len(more) + len(must)
            if guide and guide.complete:
                # The row before it chooses the last token, or the last guess with all that is
                # forced after it: nobody would read a row of theirs.
                if self._fast or not must:
                    more, must = more[:-1], []
                else:
                    must = must[:-1]
            likely *= share
            rows = len(more) + len(must) - (not draft and len(self._todo) == 1)
            if likely * self._engine.worth <= (1 - likely) * rows:
                break
            forced.update(range(len(draft) + len(more), len(draft) + len(more) + len(must)))
            draft += [*more, *must]
        if guide:
            guide.back(ahead)
        del draft[room:]
        return draft, {i for i in forced if i < room}

    def _guess(self, draft: Sequence[int]) -> tuple[list[int], float]:
        """The next guess after a draft, as far as it may be, and how likely it is."""
        assert self._guesser is not None  # noqa: S101 - as its caller found
        guess = self._guesser.guess([*self.decoded, *draft])
        if guess is None or guess.tokens[0] in self._eos:
            return [], 0.0
        fit = len(guess.tokens) if self._guide is None else self._guide.fitting(guess.tokens)
        return guess.tokens[:fit], guess.likely

    def _choose(self, logits: Floats) -> list[int]:
        """Choose the next token; returns it and those forced after it, or none at the end."""
        token, choices, bent, must = int(logits.argmax()), logits, False, list[int]()
        sampled = self._decoding.temperature > 0
        if self._guide is not None:
            must = [] if self._fast else self._guide.forced()[:1]
            allowed = self._guide.allowed()
            bent = not allowed[token]
            if bent and not allowed.any():
                msg = "the schema cannot guide: it leads to where nothing may follow"
                raise GrammarError(msg)
            if bent or sampled:
                choices = np.where(allowed, logits, np.float32(-np.inf))
        if must:
            token = must[0]
        elif bent or sampled:
            token = choose(choices, self._decoding.temperature, self._rng)
        if token in self._eos:
            self._end("stop")
            return []
        top = likeliest(logits, self._decoding.top_logprobs or 0)
        logprob = logprob_of(logits, token)
        self._accept(Token(token, "", logprob, forced=bool(must), bent=bent, top=top))
        return [token, *self._force()]

    def _force(self) -> list[int]:
        """Accept what the grammar forces now."""
        forced: list[int] = []
        if self._guide is not None and self._fast and self.finish_reason is None:
            for token in self._guide.forced():
                if self.finish_reason is not None:
                    break
                self._accept(Token(token, "", 0.0, forced=True))
                forced.append(token)
        return forced

    def _accept(self, token: Token) -> None:
        self.decoded.append(token.id)
        if self._guide is not None:
            self._guide.consume([token.id])
        shown, stopped = self._emission.add(token)
        self._ready += shown
        if stopped:
            self.finish_reason = "stop"
        elif self._guide is not None and self._guide.complete:
            self._end("stop")
        elif len(self.decoded) >= self._limit:
            self._end("length")

    def _end(self, reason: str) -> None:
        shown, stopped = self._emission.end()
        self._ready += shown
        self.finish_reason = "stop" if stopped else reason
