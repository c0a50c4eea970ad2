"""Sequences behind one another in one row, without padding; each sees its prefix and itself.

Linear maps, nine tenths of the work, have no wasted row. Attention is computed sequence by
sequence, so that its cost grows with their lengths and not with the square of the row's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Example:
    """A prompt and an answer in token ids; ``prefix`` is the part shared with other sequences."""

    prefix: tuple[int, ...]
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def tail(self) -> tuple[int, ...]:
        """What follows the prefix as input; the last token of an answer predicts nothing."""
        return self.prompt + self.answer[:-1]

    @property
    def length(self) -> int:
        """Tokens of the whole input."""
        return len(self.prefix) + len(self.tail)


@dataclass(frozen=True)
class Place:
    """A run of tokens in a row: a prefix (``is_prefix``), or what follows one.

    ``position`` is where its sequence counts from, ``start`` where it lies in the row.
    """

    tokens: tuple[int, ...]
    start: int
    position: int
    prefix: tuple[int, ...]
    is_prefix: bool


@dataclass(frozen=True)
class Group:
    """Sequences that share a prefix: its length, then theirs without it, as they lie in the row."""

    prefix: int
    tails: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a row is laid: ``places`` in its order, and ``tails``: each sequence's, in theirs."""

    places: tuple[Place, ...]
    tails: tuple[Place, ...]

    @property
    def tokens(self) -> list[int]:
        """The row's token ids."""
        return [token for place in self.places for token in place.tokens]

    @property
    def positions(self) -> list[int]:
        """Each token's position in its sequence."""
        return [p.position + i for p in self.places for i in range(len(p.tokens))]

    @property
    def groups(self) -> tuple[Group, ...]:
        """Sequences by prefix, in the row's order."""
        lengths: dict[tuple[int, ...], list[int]] = {}
        for place in self.places:
            if not place.is_prefix:
                lengths.setdefault(place.prefix, []).append(len(place.tokens))
        return tuple(Group(len(prefix), tuple(tails)) for prefix, tails in lengths.items())


def lay(sequences: Sequence[Example]) -> Layout:
    """Lay sequences by prefix, each prefix once before those that share it.

    >>> [p.start for p in lay([Example((1,), (2,), (3,)), Example((), (4,), (5,))]).places]
    [0, 1, 2]
    """
    places: list[Place] = []
    tails: dict[int, Place] = {}
    end = 0
    for prefix in dict.fromkeys(s.prefix for s in sequences):
        if prefix:
            places.append(Place(prefix, end, 0, prefix, is_prefix=True))
            end += len(prefix)
        for number, sequence in enumerate(sequences):
            if sequence.prefix == prefix:
                place = Place(sequence.tail, end, len(prefix), prefix, is_prefix=False)
                places.append(place)
                tails[number] = place
                end += len(place.tokens)
    return Layout(tuple(places), tuple(tails[i] for i in range(len(sequences))))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Sequence[Group]
) -> torch.Tensor:
    """Causal attention within each sequence and onto its prefix.

    ``query`` [tokens, heads, width], ``key`` and ``value`` [tokens, key heads, width], rotated;
    each key head serves ``heads / key heads`` queries in a row. Returns [tokens, heads * width].
    """
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    found: list[torch.Tensor] = []
    sizes = [size for group in groups for size in (group.prefix, *group.tails)]
    parts = [iter(x.split(sizes)) for x in (query, key, value)]
    for group in groups:
        prefix = [next(part) for part in parts]
        tails = [[next(part) for _ in group.tails] for part in parts]
        found.append(_sees(*(x[None] for x in prefix))[0])
        # Longer ones give the shorter keys to come, which causality hides from all but the padding.
        q, k, v = (pad_sequence(tail, batch_first=True) for tail in tails)
        k, v = (
            torch.cat([common.expand(len(own), *common.shape), own], dim=1)
            for common, own in ((prefix[1], k), (prefix[2], v))
        )
        found += [out[:size] for out, size in zip(_sees(q, k, v), group.tails, strict=True)]
    return torch.cat(found).flatten(1)


def _sees(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of the last tokens of each of a batch: [batch, tokens, heads, width] each."""
    size, before = query.shape[1], key.shape[1] - query.shape[1]
    if not size:
        return query
    mask = torch.ones(size, key.shape[1], dtype=torch.bool, device=query.device).tril(before)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
