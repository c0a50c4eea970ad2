"""Tokens of an answer: how they are chosen, and how they become text. No session here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Decoding:
    """How to decode.

    Attributes:
        max_tokens: of the answer, at most.
        temperature: 0 is greedy.
        seed: of sampling.
        stop: texts that end an answer.
        grammar: that the answer obeys (``edge/student/guide.py``); None where it is free.
        top_logprobs: so many likeliest tokens are told beside each token. None: nobody asks for
            log-probabilities, and those of forced tokens are not computed.
        speculate: whether tokens are guessed ahead; the answer is the same either way.
    """

    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    top_logprobs: int | None = None
    speculate: bool = True


@dataclass(frozen=True)
class Token:
    """One decoded token.

    Attributes:
        id: its number.
        text: empty while a character is incomplete.
        logprob: in nats, of the student without guidance; 0 where the token was forced and nobody
            asked for it.
        forced: the grammar left no other choice.
        bent: the student alone would have chosen what the grammar forbids.
        top: the likeliest tokens at this place with their log-probabilities, if asked for.
    """

    id: int
    text: str
    logprob: float
    forced: bool = False
    bent: bool = False
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """A whole answer; ``surprise`` as :func:`surprise` has it, in nats."""

    text: str
    surprise: float
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def surprise(tokens: Sequence[Token]) -> float:
    """Mean negative log-likelihood in nats of the tokens that were chosen; 0 for none.

    Forced tokens say nothing of the student.

    >>> surprise([Token(1, "a", -0.5), Token(2, "b", -1.5), Token(3, "c", 0.0, forced=True)])
    1.0
    """
    chosen = [t.logprob for t in tokens if not t.forced]
    return -sum(chosen) / len(chosen) if chosen else 0.0


def logprob_of(logits: Floats, token: int) -> float:
    """Natural log of the probability of ``token`` under ``logits`` [vocabulary]."""
    peak = float(logits.max())
    shares = logits - peak
    np.exp(shares, out=shares)
    return float(logits[token]) - peak - math.log(float(shares.sum()))


def likeliest(logits: Floats, count: int) -> tuple[tuple[int, float], ...]:
    """The ``count`` likeliest tokens with their log-probabilities, likeliest first.

    >>> [(i, round(p, 2)) for i, p in likeliest(np.array([0.0, 1.0, 0.0], np.float32), 2)]
    [(1, -0.55), (0, -1.55)]
    """
    if count < 1:
        return ()
    least = np.partition(logits, -count)[-count]  # sorting the whole vocabulary takes milliseconds
    among = np.flatnonzero(logits >= least)
    order = among[np.argsort(-logits[among], kind="stable")][:count]
    return tuple((int(i), logprob_of(logits, int(i))) for i in order)


def choose(logits: Floats, temperature: float, rng: np.random.Generator) -> int:
    """Pick a token from ``logits`` [vocabulary]; what is minus infinity is never picked."""
    if temperature > 0:
        scaled = (logits - logits.max()).astype(np.float64) / temperature
        p = np.exp(scaled)
        return int(rng.choice(len(p), p=p / p.sum()))
    return int(logits.argmax())


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop text begins, or None.

    >>> first_stop("one. two", [" two", "."])
    3
    """
    found = [i for i in (text.find(s) for s in stops if s) if i >= 0]
    return min(found, default=None)


def may_stop(text: str, stops: Sequence[str]) -> bool:
    """Whether the end of ``text`` may be the beginning of a stop text.

    >>> may_stop("one.", [". "]), may_stop("one", [". "])
    (True, False)
    """
    return any(text.endswith(s[:n]) for s in stops for n in range(1, len(s)))


def shorten(tokens: Sequence[Token], length: int) -> Iterator[Token]:
    """The first ``length`` characters of tokens, as tokens.

    >>> [t.text for t in shorten([Token(1, "ab", -1.0), Token(2, "cd", -1.0)], 3)]
    ['ab', 'c']
    """
    for token in tokens:
        if length <= 0:
            return
        yield replace(token, text=token.text[:length])
        length -= len(token.text)


class Emission:
    """Turns decoded tokens into text.

    Tokens are held back while a character is incomplete, or a stop text may have begun.

    Args:
        decode: text of tokens.
        stops: texts that end an answer; the answer ends before them.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        self._decode = decode
        self._stops = stops
        self._ids: list[int] = []
        self._shown = self._tail = ""
        self._held: list[Token] = []

    def add(self, token: Token) -> tuple[list[Token], bool]:
        """Take a token without its text.

        Returns:
            Tokens that may be shown now, and whether a stop text has ended the answer.
        """
        self._ids.append(token.id)
        text = self._decode(self._ids)
        # A last character that is no text yet may become some with the next token.
        fresh, self._tail = text[len(self._shown) :], ""
        if text.endswith(_REPLACEMENT):
            fresh, self._tail = "", fresh
        self._shown += fresh
        self._held.append(replace(token, text=fresh))
        pending = "".join(t.text for t in self._held)
        cut = first_stop(pending, self._stops)
        if cut is not None:
            return self._release(cut), True
        if self._tail or may_stop(pending, self._stops):
            return [], False
        return self._release(None), False

    def end(self) -> tuple[list[Token], bool]:
        """No token follows: give what was held back, as :meth:`add` does."""
        cut = None
        if self._tail and self._held:  # it is what a decoder makes of the bytes there are
            self._held[-1] = replace(self._held[-1], text=self._tail)
            cut = first_stop("".join(t.text for t in self._held), self._stops)
        return self._release(cut), cut is not None

    def _release(self, cut: int | None) -> list[Token]:
        held, self._held, self._tail = self._held, [], ""
        return held if cut is None else list(shorten(held, cut))
