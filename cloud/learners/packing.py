"""Sequences behind one another in one row, without padding; each sees its prefix and itself.

Linear maps, nine tenths of the work, see one long row. Attention is computed sequence by sequence:
its cost grows with the square of their lengths and not of the row's, and the keys and values of a
prefix are copied for each sequence that shares it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

_PAIRS = 2**15
"""Of queries and keys: for fewer, torch's fused attention takes longer on a processor than its
parts do. For more, weights of all pairs would be kept for the gradient."""


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
    """A run of tokens in a row: a prefix, or what follows one.

    ``start`` is where it lies in the row, ``prefix`` what precedes it in its sequence, and ``sees``
    the number of the place where that lies, if anywhere.
    """

    tokens: tuple[int, ...]
    start: int
    prefix: tuple[int, ...]
    sees: int | None
    is_prefix: bool


def prefixes(sequences: Sequence[Example]) -> tuple[tuple[int, ...], ...]:
    """Each prefix of some sequences once, in their order."""
    return tuple(dict.fromkeys(s.prefix for s in sequences if s.prefix))


def lay(sequences: Sequence[Example]) -> tuple[Place, ...]:
    """Lay each prefix once, then what follows it in each sequence, in their order.

    >>> [p.start for p in lay([Example((1,), (2,), (3,)), Example((), (4,), (5,))])]
    [0, 1, 2]
    """
    places: list[Place] = []
    numbers: dict[tuple[int, ...], int] = {}
    end = 0
    for prefix in prefixes(sequences):
        numbers[prefix] = len(places)
        places.append(Place(prefix, end, (), None, is_prefix=True))
        end += len(prefix)
    for s in sequences:
        places.append(Place(s.tail, end, s.prefix, numbers.get(s.prefix), is_prefix=False))
        end += len(s.tail)
    return tuple(places)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: Sequence[Place],
    scale: float,
) -> torch.Tensor:
    """Causal attention within each sequence and onto its prefix.

    ``query`` [tokens, heads, width], ``key`` and ``value`` [tokens, key heads, width], rotated;
    each key head serves so many consecutive query heads. Returns [tokens, heads * width].
    """
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    lengths = [len(place.tokens) for place in places]
    queries, keys, values = (
        torch.split(x.transpose(0, 1)[None], lengths, dim=2) for x in (query, key, value)
    )
    outputs: list[torch.Tensor] = []
    for i, place in enumerate(places):
        seen = [i] if place.sees is None else [place.sees, i]
        k, v = (torch.cat([x[run] for run in seen], dim=2) for x in (keys, values))
        outputs.append(_causal(queries[i], k, v, scale))
    return torch.cat(outputs, 2)[0].transpose(0, 1).flatten(1)


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """The last tokens of a sequence look back: [1, heads, tokens, width] each, in fp32."""
    size, whole = query.shape[2], key.shape[2]
    mask = torch.ones(size, whole, dtype=torch.bool, device=query.device).tril(whole - size)
    query, key, value = query.float(), key.float(), value.float()
    with torch.autocast(query.device.type, enabled=False):
        if size * whole >= _PAIRS or query.device.type != "cpu":
            return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        scores = query @ key.transpose(2, 3) * scale
        return torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1) @ value
