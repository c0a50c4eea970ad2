"""A causal LM cut in two: frozen lower layers whose outputs are kept, upper layers that learn.

Three things make a step cheap on a CPU. What the frozen layers make of a sequence is computed
once. Sequences are packed behind one another in a single row, without padding, and those with the
same system prompt share it under a block mask. The head, a fifth of the work with 49,152 words, is
applied only where logits are wanted.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LlamaForCausalLM

_ENCODE_TOKENS = 512  # rows of one matrix product when the frozen layers read fresh sequences


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
class Packed:
    """Sequences in one row: hidden states [1, tokens, width], positions, mask, answer rows."""

    hidden: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    mask: torch.Tensor
    rows: torch.Tensor


class Upper(nn.Module):
    """The layers that learn, with the final norm."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, packed: Packed) -> torch.Tensor:
        """Normalised hidden states [answer tokens, width] at the packed rows."""
        hidden = _run(self.layers, packed.hidden, packed.mask, packed.rotary)
        normed: torch.Tensor = self.norm(hidden[0, packed.rows])
        return normed


def _run(
    layers: nn.ModuleList | Sequence[nn.Module],
    hidden: torch.Tensor,
    mask: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    for layer in layers:
        out = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


class SplitModel:
    """Lower layers, head and rotary tables of a Llama, and its upper layers as a module.

    Args:
        model: in fp32; it is taken over, and its upper layers are trained in place.
        split: how many layers stay frozen, counted from the input.
        device: where to compute.
    """

    def __init__(self, model: LlamaForCausalLM, *, split: int, device: torch.device) -> None:
        model.requires_grad_(requires_grad=False)
        nn.Module.to(model, device)
        inner = model.model
        self.device = device
        self.split = split
        self._embed = inner.embed_tokens
        self._lower = list(inner.layers[:split])
        self._rotary = inner.rotary_emb
        self._head = model.lm_head
        self.upper = Upper(list(inner.layers[split:]), inner.norm)
        self._prefixes: dict[tuple[int, ...], torch.Tensor] = {}
        self._tails: dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}

    def copy_upper(self) -> Upper:
        """A frozen copy of the upper layers as they are now."""
        return copy.deepcopy(self.upper).requires_grad_(requires_grad=False)

    def trainable(self) -> dict[str, torch.Tensor]:
        """Learnt parameters by their name in the whole model."""
        state: dict[str, torch.Tensor] = {}
        for name, value in self.upper.named_parameters():
            if name.startswith("layers."):
                _, index, rest = name.split(".", 2)
                state[f"model.layers.{int(index) + self.split}.{rest}"] = value
            else:
                state[f"model.{name}"] = value
        return state

    @torch.no_grad()
    def encode(self, sequences: Sequence[Example]) -> None:
        """Run the frozen layers over sequences not seen before and keep the result."""
        fresh = {(s.prefix, s.tail): s for s in sequences if (s.prefix, s.tail) not in self._tails}
        batch: list[Example] = []
        for sequence in fresh.values():
            batch.append(sequence)
            if sum(s.length for s in batch) >= _ENCODE_TOKENS:
                self._encode(batch)
                batch = []
        if batch:
            self._encode(batch)

    def _encode(self, batch: Sequence[Example]) -> None:
        places = _places(batch)
        ids = torch.tensor([t for part in places for t in part.tokens], device=self.device)
        hidden = self._embed(ids)[None]
        hidden = _run(self._lower, hidden, _mask(places, self.device), self._tables(places, hidden))
        for part in places:
            kept = hidden[0, part.start : part.start + len(part.tokens)].clone()
            if part.is_prefix:
                self._prefixes[part.tokens] = kept
            else:
                self._tails[part.prefix, part.tokens] = kept

    def pack(self, sequences: Sequence[Example]) -> Packed:
        """Lay sequences behind one another; equal prefixes are laid once."""
        self.encode(sequences)
        places = _places(sequences)
        hidden = torch.cat(
            [
                self._prefixes[p.tokens] if p.is_prefix else self._tails[p.prefix, p.tokens]
                for p in places
            ]
        )[None]
        tails = [p for p in places if not p.is_prefix]
        rows = [
            part.start + i
            for part, sequence in zip(tails, sequences, strict=True)
            for i in range(len(sequence.prompt) - 1, len(part.tokens))
        ]
        return Packed(
            hidden,
            self._tables(places, hidden),
            _mask(places, self.device),
            torch.tensor(rows, device=self.device),
        )

    def _tables(
        self, places: Sequence[_Place], hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = [p.position + i for p in places for i in range(len(p.tokens))]
        cos, sin = self._rotary(hidden, torch.tensor([positions], device=self.device))
        return cos, sin

    def log_probs(self, upper: Upper, sequences: Sequence[Example]) -> torch.Tensor:
        """Log-probabilities [answer tokens of all sequences, vocabulary], in nats."""
        return torch.log_softmax(self._head(upper(self.pack(sequences))), dim=-1)


@dataclass(frozen=True)
class _Place:
    """A run of tokens in a packed row; a tail sees its prefix's run and itself."""

    tokens: tuple[int, ...]
    start: int
    position: int
    prefix: tuple[int, ...]
    prefix_start: int
    is_prefix: bool


def _places(sequences: Sequence[Example]) -> list[_Place]:
    places: list[_Place] = []
    starts: dict[tuple[int, ...], int] = {}
    end = 0
    for prefix in dict.fromkeys(s.prefix for s in sequences if s.prefix):
        starts[prefix] = end
        places.append(_Place(prefix, end, 0, (), 0, is_prefix=True))
        end += len(prefix)
    for s in sequences:
        begin = starts.get(s.prefix, 0)
        places.append(_Place(s.tail, end, len(s.prefix), s.prefix, begin, is_prefix=False))
        end += len(s.tail)
    return places


def _mask(places: Sequence[_Place], device: torch.device) -> torch.Tensor:
    """Additive attention mask [1, 1, tokens, tokens]: causal, within a run and onto its prefix."""
    total = sum(len(p.tokens) for p in places)
    mask = torch.full((total, total), float("-inf"), device=device)
    for p in places:
        size = len(p.tokens)
        own = torch.full((size, size), float("-inf"), device=device).triu(1)
        mask[p.start : p.start + size, p.start : p.start + size] = own
        if p.prefix:
            mask[p.start : p.start + size, p.prefix_start : p.prefix_start + len(p.prefix)] = 0.0
    return mask[None, None]
