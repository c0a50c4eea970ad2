"""Guess the next tokens, from the prompt and from answers of the past.

What the latest tokens were followed by before, they may be followed by again (prompt lookup
decoding). Answers of one skill share more than tokens: they have the same shape, filled with words
of the request. So past answers are kept as *shapes*, in which a run of words that stand in the
request is one symbol, and a guess fills the shape with the words of this request. A guess changes
nothing: the student checks each token of it. But a wrong one costs a row of a pass, so each says
how likely it is, counted from past answers.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_COPY, _SPACED = -1, -2  # symbols: words of the request, without or with a space before
_END = -3
_ASKED = 256  # characters of a request that are looked at
_ANSWERED = 64  # tokens of an answer that are looked at
_LONGEST = 6  # symbols that are looked back
_LOOKUP = (0.2, 0.5, 0.7)  # of guesses out of the prompt: by how many tokens they follow
_NEW = 0.3  # observations that a context is worth which was not seen
_NEAR = 3  # symbols beside which words of requests are counted
_PRIOR = 0.3  # observations, of a word that was not seen
_TRUST = 0.5  # words of a request are not independent: each counts half
_WHOLE = 0.8  # of guesses how a word goes on that has begun
_WORD = re.compile(r"\w+")


class Spelling(NamedTuple):
    """Between tokens and text: the text of one token, and the tokens of a text."""

    decode: Callable[[int], str]
    encode: Callable[[str], list[int]]


class Guess(NamedTuple):
    """Tokens that may come next, all or none, and how likely that is: 0..1."""

    tokens: list[int]
    likely: float


class Request:
    """A request's text and where its words are; of a long one, the beginning."""

    def __init__(self, text: str) -> None:
        self.text = text = text[:_ASKED]
        self.spans = [m.span() for m in _WORD.finditer(text)]
        self.vocabulary = {self.word(i).lower() for i in range(len(self.spans))}
        self.begins = {begin: i for i, (begin, _) in enumerate(self.spans)}

    def word(self, index: int) -> str:
        """A word."""
        begin, end = self.spans[index]
        return self.text[begin:end]

    def run(self, text: str, at: int) -> tuple[int, int]:
        """The longest run of whole words that ``text`` has at ``at``, too; its last may be begun.

        Returns:
            Where it begins in the request, and its length in characters: 0 if there is none.
        """
        best = (0, 0)
        for begin in self.begins:
            if self.text[begin] != text[at]:
                continue
            length = _common(self.text[begin:], text[at:])
            if at + length < len(text):
                while length and not self._whole(begin, text, at, length):
                    length -= 1
            best = max(best, (begin, length), key=lambda run: run[1])
        return best

    def _whole(self, begin: int, text: str, at: int, length: int) -> bool:
        ends = text[at + length - 1].isalnum() and not text[at + length].isalnum()
        rest = self.text[begin + length : begin + length + 1]
        return ends and not rest.isalnum()


def _common(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass
class Shape:
    """An answer as symbols.

    Attributes:
        symbols: tokens, and what stands for words of the request.
        runs: where each run begins and ends in the request.
        open: the answer ends with the last run.
    """

    symbols: list[int] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)
    open: bool = False

    def holds(self, begin: int) -> bool:
        """Whether the word of the request that begins there is in a run."""
        return any(first <= begin < end for first, end in self.runs)


def shape(request: Request, tokens: Sequence[int], decode: Callable[[int], str]) -> Shape:
    """The shape of an answer to a request.

    >>> words = {1: '"', 2: "hall", 3: " lamp", 4: '"}'}
    >>> shape(Request("hall lamp on"), [1, 2, 3, 4], words.__getitem__).symbols
    [1, -1, 4]
    """
    pieces = [decode(t) for t in tokens]
    text = "".join(pieces)
    at, places = 0, {}
    for i, piece in enumerate(pieces):
        places[at] = i
        at += len(piece)
    places[at] = len(pieces)
    made, i, at = Shape(), 0, 0
    while i < len(pieces):
        spaced = pieces[i].startswith(" ")
        first = at + spaced
        begin = length = 0
        if text[first : first + 1].isalnum() and not text[first - 1 : first].isalnum():
            begin, length = request.run(text, first)
        end = places.get(first + length)
        if length and end is not None:
            made.symbols.append(_SPACED if spaced else _COPY)
            made.runs.append((begin, begin + length))
            made.open = end == len(pieces)
            at, i = first + length, end
        else:
            made.symbols.append(tokens[i])
            made.open = False
            at, i = at + len(pieces[i]), i + 1
    return made


class PastAnswers:
    """The latest different answers, with what was asked.

    Args:
        spelling: of the student's tokens.
        limit: how many are kept.
    """

    def __init__(self, spelling: Spelling, limit: int = 128) -> None:
        self.spelling = spelling
        self._limit = limit
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], None] = OrderedDict()
        self._follows: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self._beside: dict[tuple[int, ...], Counter[str]] = defaultdict(Counter)
        self._words: dict[str, Counter[str]] = defaultdict(Counter)
        self._stale = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """What was asked and the answer's tokens, oldest first."""
        return iter(self._kept)

    def add(self, asked: str, answer: Sequence[int]) -> None:
        """Keep an answer; it is the newest from now on."""
        if not answer:
            return
        pair = (asked[:_ASKED], tuple(answer[:_ANSWERED]))
        if pair not in self._kept:
            self._count(*pair)
        self._kept[pair] = None
        self._kept.move_to_end(pair)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
            self._stale += 1
        if self._stale > self._limit:  # the counts still know what has left
            self._follows.clear()
            self._beside.clear()
            self._words.clear()
            self._stale = 0
            for kept in self._kept:
                self._count(*kept)

    def _count(self, asked: str, answer: tuple[int, ...]) -> None:
        request = Request(asked)
        made = shape(request, answer, self.spelling.decode)
        for at, symbol in enumerate([*made.symbols, _END]):
            for size in range(min(_LONGEST, at) + 1):
                self._follows[tuple(made.symbols[at - size : at])][symbol] += 1
            near = [*made.symbols[max(at - _NEAR, 0) : at], symbol]
            self._beside[tuple(near)].update(request.vocabulary)
        starts = {begin for begin, _ in made.runs}
        for i, (begin, _) in enumerate(request.spans):
            word = self._words[request.word(i)]
            word["seen"] += 1
            word["first"] += begin in starts
            word["copied"] += made.holds(begin)

    def next(self, symbols: Sequence[int], request: Request) -> tuple[int, float] | None:
        """What follows most often, and how likely it is.

        A longer match counts for more; where several symbols may follow, the words of the request
        speak for those beside which they were seen (naive Bayes).
        """
        levels: list[Counter[int]] = []
        for size in range(min(_LONGEST, len(symbols)) + 1):
            seen = self._follows.get(tuple(symbols[len(symbols) - size :]))
            if seen is None:
                break
            levels.append(seen)
        if not levels:
            return None
        near = tuple(symbols[max(len(symbols) - _NEAR, 0) :])
        often = self._follows.get(near, Counter())
        # No word was seen beside what never followed the latest symbols: together it is the rest.
        likely = dict.fromkeys(levels[min(_NEAR, len(levels) - 1)], 0.0)
        known = 0.0
        for seen in levels:
            total = seen.total()
            known = (total + _NEW * known) / (total + _NEW)
            for symbol, share in likely.items():
                likely[symbol] = (seen[symbol] + _NEW * share) / (total + _NEW)
        rest = (known - sum(likely.values())) * (1 / 2) ** (_TRUST * len(request.vocabulary))
        for symbol in likely:
            words, count = self._beside.get((*near, symbol), Counter()), often[symbol]
            for word in request.vocabulary:
                likely[symbol] *= ((words[word] + _PRIOR) / (count + 2 * _PRIOR)) ** _TRUST
        best = max(likely, key=likely.__getitem__)
        return best, likely[best] / (sum(likely.values()) + rest)

    def copies(self, word: str, part: str) -> float:
        """How likely a word of a request is copied (``part``: ``copied``), or begins a run."""
        seen = self._words.get(word, Counter())
        return (seen[part] + 0.5) / (seen["seen"] + 1)


class Guesser:
    """Guesses for one chat.

    Args:
        prompt: its tokens.
        asked: text of the request in it.
        past: answers of other chats.
    """

    def __init__(self, prompt: Sequence[int], asked: str, past: PastAnswers) -> None:
        self._past = past
        self._request = Request(asked)
        self._prompt = list(prompt)
        self._index: dict[tuple[int, ...], int] = {}
        for at in range(1, len(prompt)):
            for size in range(1, min(len(_LOOKUP), at) + 1):
                self._index[tuple(prompt[at - size : at])] = prompt[at]

    def guess(self, answer: Sequence[int]) -> Guess | None:
        """What may come after the tokens ``answer``."""
        guesses = [self._from_prompt(answer), self._from_past(answer)]
        return max((g for g in guesses if g), key=lambda g: g.likely, default=None)

    def _from_prompt(self, answer: Sequence[int]) -> Guess | None:
        tail = [*self._prompt[-len(_LOOKUP) :], *answer][-len(_LOOKUP) :]
        for size in range(len(tail), 0, -1):
            token = self._index.get(tuple(tail[-size:]))
            if token is not None:
                return Guess([token], _LOOKUP[size - 1])
        return None

    def _from_past(self, answer: Sequence[int]) -> Guess | None:
        spelling, request = self._past.spelling, self._request
        made = shape(request, answer[-_ANSWERED:], spelling.decode)
        likely = 1.0
        if made.open:
            end = made.runs[-1][1]
            rest = _WORD.match(request.text, end)
            if rest is not None and end not in request.begins:
                return self._spelled(rest.group(), _WHOLE)
            following = next((i for b, i in request.begins.items() if b >= end), None)
            if following is not None:
                goes_on = self._past.copies(request.word(following), "copied")
                if goes_on >= 1 / 2:
                    return self._spelled(request.text[end : request.spans[following][1]], goes_on)
                likely = 1 - goes_on
        found = self._past.next(made.symbols, request)
        if found is None or found[0] == _END:
            return None
        symbol, share = found
        if symbol in {_COPY, _SPACED}:
            return self._copied(made, " " if symbol == _SPACED else "", likely * share)
        return Guess([symbol], likely * share)

    def _copied(self, made: Shape, space: str, likely: float) -> Guess | None:
        """The word of the request that a run begins with."""
        weights = {
            i: self._past.copies(self._request.word(i), "first")
            for i, (begin, _) in enumerate(self._request.spans)
            if not made.holds(begin)
        }
        if not weights:
            return None
        best = max(weights, key=weights.__getitem__)
        likely *= weights[best] / sum(weights.values())
        return self._spelled(space + self._request.word(best), likely)

    def _spelled(self, text: str, likely: float) -> Guess | None:
        tokens = self._past.spelling.encode(text)
        return Guess(tokens, likely) if tokens else None
