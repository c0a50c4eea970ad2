"""Guess the next tokens: from the prompt, and from answers of the past.

What the latest tokens were followed by before, they may be followed by again (prompt lookup
decoding). A guess costs little and changes nothing: the student checks each token of it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Index = dict[tuple[int, ...], tuple[Sequence[int], int]]

_LONGEST = 4
LEAD = 3
"""Tokens before an answer that are kept with it: enough to know the beginning of any answer."""


class PastAnswers:
    """The latest different answers, as tokens.

    Args:
        limit: how many are kept.
    """

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self._answers: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._index: Index = {}
        self._stale = 0

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """Oldest first, each with the tokens before it."""
        return iter(self._answers)

    def add(self, lead: Sequence[int], answer: Sequence[int]) -> None:
        """Keep an answer that came after the tokens ``lead``; it is the newest from now on."""
        sequence = (*lead[-LEAD:], *answer)
        if not answer:
            return
        self._answers[sequence] = None
        self._answers.move_to_end(sequence)
        while len(self._answers) > self._limit:
            self._answers.popitem(last=False)
            self._stale += 1
        if self._stale > self._limit:  # the index still knows what has left
            self._index, self._stale = {}, 0
            for kept in self._answers:
                _enter(self._index, kept, 1)
        _enter(self._index, sequence, 1)

    def find(self, gram: tuple[int, ...]) -> tuple[Sequence[int], int] | None:
        """Where ``gram`` last occurred: the sequence and the position after it."""
        return self._index.get(gram)


class Guesser:
    """Guesses for one chat.

    Args:
        prompt: its tokens.
        past: answers of other chats.
    """

    def __init__(self, prompt: Iterable[int], past: PastAnswers) -> None:
        self._past = past
        self._tokens: list[int] = []
        self._index: Index = {}
        self.extend(prompt)

    def extend(self, tokens: Iterable[int]) -> None:
        """Take tokens that are certain."""
        start = len(self._tokens)
        self._tokens.extend(tokens)
        _enter(self._index, self._tokens, max(start, 1))

    def guess(self, count: int) -> list[int]:
        """At most ``count`` tokens that may follow; one where a single token is all that is known.

        >>> guesser = Guesser([5, 6, 7, 8, 9, 5, 6, 7], PastAnswers())
        >>> guesser.guess(2)
        [8, 9]
        """
        for size in range(min(_LONGEST, len(self._tokens)), 0, -1):
            gram = tuple(self._tokens[-size:])
            found = self._index.get(gram) or self._past.find(gram)
            if found is not None:
                sequence, at = found
                return list(sequence[at : at + (count if size > 1 else 1)])
        return []


def _enter(index: Index, sequence: Sequence[int], start: int) -> None:
    """Note of every token from ``start`` on what stands before it."""
    for at in range(start, len(sequence)):
        for size in range(1, min(_LONGEST, at) + 1):
            index[tuple(sequence[at - size : at])] = (sequence, at)
