"""A causal LM cut in two: frozen lower layers whose outputs are kept, upper layers that learn.

Four things make a step cheap on a CPU. What the frozen layers make of a sequence is computed
once. Sequences are packed behind one another in a single row, and those with the same system prompt
share it. Each attends to itself and its prompt only. The last layer's second half and the head, a
fifth of the work with 49,152 words, are applied only where logits are wanted.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cloud.learners.lora import LoraLinear, adapt
from cloud.learners.packing import attend, lay, prefixes
from cloud.learners.precision import fp32_products
from cloud.learners.sampling import sample
from protos.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import LlamaForCausalLM

    from cloud.learners.packing import Example, Place

_ENCODE_TOKENS = 512  # rows of one matrix product when the frozen layers read fresh sequences


@dataclass(frozen=True)
class Packed:
    """Sequences in one row: token ids, hidden states [tokens, width], who sees whom, answer rows.

    ``hidden`` is what the frozen layers made of the ids; None where even the embeddings learn.
    ``rotary`` are cosines and sines [tokens, head width].
    """

    ids: torch.Tensor
    hidden: torch.Tensor | None
    rotary: tuple[torch.Tensor, torch.Tensor]
    places: tuple[Place, ...]
    rows: torch.Tensor


class Upper(nn.Module):
    """The layers from the first that learns, with the final norm, and embeddings if they learn."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        embed: nn.Module | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.embed = embed
        self.head = head

    def forward(self, packed: Packed) -> torch.Tensor:
        """Normalised hidden states [answer tokens, width] at the packed rows."""
        hidden = packed.hidden
        if hidden is None:
            assert self.embed is not None  # noqa: S101  # packed for a model whose embeddings learn
            hidden = self.embed(packed.ids)
        hidden = _run(self.layers, hidden, packed.places, packed.rotary, packed.rows)
        normed: torch.Tensor = self.norm(hidden)
        return normed


def _run(
    layers: nn.ModuleList | Sequence[nn.Module],
    hidden: torch.Tensor,
    places: Sequence[Place],
    rotary: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Hidden states [tokens, width] after some layers; of the last, only ``rows`` if given."""
    for i, layer in enumerate(layers, 1):
        hidden = _layer(layer, hidden, places, rotary, rows if i == len(layers) else None)
    return hidden


def _layer(
    layer: Any,  # noqa: ANN401  # transformers' LlamaDecoderLayer, whose parts have no types
    hidden: torch.Tensor,
    places: Sequence[Place],
    rotary: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """One layer of a Llama (Touvron et al., arXiv 2302.13971), packed; no cache and no dropout."""
    own = layer.self_attn
    normed = layer.input_layernorm(hidden)
    query, key, value = (
        project(normed).unflatten(1, (-1, own.head_dim))
        for project in (own.q_proj, own.k_proj, own.v_proj)
    )
    seen = attend(_rotate(query, *rotary), _rotate(key, *rotary), value, places, own.scaling)
    if rows is not None:
        hidden, seen = hidden[rows], seen[rows]
    hidden = hidden + own.o_proj(seen)
    out: torch.Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864) of ``heads`` [tokens, heads, width]."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return heads * cos[:, None] + turned * sin[:, None]


class SplitModel:
    """Lower layers, head and rotary tables of a Llama, and its upper layers as a module.

    Args:
        model: in fp32; it is taken over, and its upper layers are trained in place.
        split: how many layers stay frozen for certain, counted from the input.
        device: where to compute.
        begin: the first layer that learns, at least ``split``; None: that one.
        end: the layers from here on stay frozen too; None: all from ``begin`` on learn.
        embeddings: embeddings and head learn as well; then ``split`` is 0.
        held_embeddings: they were learnt before: they belong to the upper layers, but learn no
            more unless ``embeddings``; ``split`` is 0 then, too.
        bf16: products of layers are in bfloat16; logits that are learnt from, and what is kept, are
            fp32.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        split: int,
        device: torch.device,
        begin: int | None = None,
        end: int | None = None,
        embeddings: bool = False,
        held_embeddings: bool = False,
        bf16: bool = False,
    ) -> None:
        model.requires_grad_(requires_grad=False)
        nn.Module.to(model, device)
        inner = model.model
        self.device = device
        self.split = split
        self.bf16 = bf16
        self._whole = model
        self._embed = inner.embed_tokens
        self._lower = list(inner.layers[:split])
        self._rotary = inner.rotary_emb
        self._head = model.lm_head
        outer = (inner.embed_tokens, model.lm_head) if embeddings or held_embeddings else ()
        self.upper = Upper(list(inner.layers[split:]), inner.norm, *outer)
        self._outer = ("embed.", "head.") if embeddings else ()
        last = len(inner.layers) if end is None else end
        self._learning = range((split if begin is None else begin) - split, last - split)
        if not self._learning:
            msg = "no layer would learn: widen `layers`, such as 0.5:1.0"
            raise TrainingError(msg)
        self._rank = 0
        self._prefixes: dict[tuple[int, ...], torch.Tensor] = {}
        self._tails: dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}

    def copy_upper(self) -> Upper:
        """A frozen copy of the upper layers as they are now."""
        return copy.deepcopy(self.upper).requires_grad_(requires_grad=False)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over weights by their name in the whole model.

        Raises:
            TrainingError: one of them is not among the upper layers, or has another shape.
        """
        upper = self.weights()
        for name, value in state.items():
            if name not in upper or upper[name].shape != value.shape:
                msg = (
                    f"{name} was learnt before and cannot be gone on from: "
                    "check `layers` and `embeddings`"
                )
                raise TrainingError(msg)
            upper[name].data.copy_(value)

    def add_adapters(self, rank: int, alpha: float, seed: int) -> None:
        """Give the linear maps of the layers that learn adapters: only these learn then."""
        generator = torch.Generator().manual_seed(seed)
        for i in self._learning:
            adapt(self.upper.layers[i], rank=rank, scale=alpha / rank, generator=generator)
        self._rank = rank

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that an optimizer may change, by their name in the upper layers."""
        learning = tuple(f"layers.{i}." for i in self._learning)
        last = self._learning.stop == len(self.upper.layers)
        outside = (*self._outer, "norm.") if last else self._outer
        chosen: dict[str, nn.Parameter] = {}
        for name, value in self.upper.named_parameters():
            inside = name.startswith(learning)
            if self._rank:
                if inside and name.endswith((".up", ".down")):
                    chosen[name] = value
            elif inside or name.startswith(outside):
                chosen[name] = value
        return chosen

    def learnt(self) -> dict[str, torch.Tensor]:
        """What learning may have changed, by name in the whole model, adapters merged."""
        if not self._rank:
            return {self._name(name): p.detach() for name, p in self.trainable().items()}
        with fp32_products("ieee"):  # adapters are merged without rounding
            return {
                self._name(f"{name}.weight"): module.merged()
                for name, module in self.upper.named_modules()
                if isinstance(module, LoraLinear)
            }

    def weights(self) -> dict[str, torch.Tensor]:
        """The upper layers' parameters as they are, by name in the whole model."""
        return {self._name(name): value for name, value in self.upper.named_parameters()}

    def everything(self) -> dict[str, nn.Parameter]:
        """All parameters as they are, also those that never learn, by name in the whole model."""
        return dict(self._whole.named_parameters())

    def _name(self, name: str) -> str:
        """The whole model's name of a parameter of the upper layers."""
        name = name.replace(".base.weight", ".weight")
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            return f"model.layers.{int(index) + self.split}.{rest}"
        if name.startswith("embed."):
            return f"model.embed_tokens.{name.removeprefix('embed.')}"
        return f"lm_{name}" if name.startswith("head.") else f"model.{name}"

    def sample(
        self, prompts: Sequence[Example], *, temperature: float, cap: int, end: int, seed: int
    ) -> list[tuple[int, ...]]:
        """One sampled answer to each prompt, with its end token unless ``cap`` cut it."""
        texts = [(*p.prefix, *p.prompt) for p in prompts]
        with self._narrow(), fp32_products("ieee"):
            return sample(self._whole, texts, temperature=temperature, cap=cap, end=end, seed=seed)

    def _narrow(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def encode(self, sequences: Sequence[Example]) -> None:
        """Run the frozen layers over sequences not seen before and keep the result."""
        if self.upper.embed is not None:
            return
        fresh = {(s.prefix, s.tail): s for s in sequences if (s.prefix, s.tail) not in self._tails}
        batch: list[Example] = []
        for sequence in fresh.values():
            batch.append(sequence)
            if sum(s.length for s in batch) >= _ENCODE_TOKENS:
                self._encode(batch)
                batch = []
        if batch:
            self._encode(batch)

    def made_of(self, sequences: Sequence[Example]) -> list[torch.Tensor]:
        """What the frozen layers made of sequences, of prefixes first: for :meth:`put`."""
        if self.upper.embed is not None:
            return []
        tails = [self._tails[s.prefix, s.tail] for s in sequences]
        return [*(self._prefixes[p] for p in prefixes(sequences)), *tails]

    def put(self, sequences: Sequence[Example], hidden: Sequence[torch.Tensor]) -> None:
        """Take over what :meth:`made_of` gave for the same sequences, split and weights."""
        if self.upper.embed is not None:
            return
        first = prefixes(sequences)
        tails = [(s.prefix, s.tail) for s in sequences]
        self._prefixes.update(zip(first, hidden[: len(first)], strict=True))
        self._tails.update(zip(tails, hidden[len(first) :], strict=True))

    def _encode(self, batch: Sequence[Example]) -> None:
        places = lay(batch)
        with self._narrow():
            hidden = _run(self._lower, self._embed(self._ids(places)), places, self._tables(places))
        for part in places:
            kept = hidden[part.start : part.start + len(part.tokens)].clone()
            if part.is_prefix:
                self._prefixes[part.tokens] = kept
            else:
                self._tails[part.prefix, part.tokens] = kept

    def pack(self, sequences: Sequence[Example], *, keep: bool = True) -> Packed:
        """Lay sequences behind one another; equal prefixes are laid once.

        ``keep`` what the frozen layers make of them for the next time.
        """
        places = lay(sequences)
        ids, rotary = self._ids(places), self._tables(places)
        hidden: torch.Tensor | None = None
        if self.upper.embed is None and keep:
            self.encode(sequences)
            hidden = torch.cat(
                [
                    self._prefixes[p.tokens] if p.is_prefix else self._tails[p.prefix, p.tokens]
                    for p in places
                ]
            )
        elif self.upper.embed is None:
            with torch.no_grad(), self._narrow():
                hidden = _run(self._lower, self._embed(ids), places, rotary)
        tails = [p for p in places if not p.is_prefix]
        rows = [
            part.start + i
            for part, sequence in zip(tails, sequences, strict=True)
            for i in range(len(sequence.prompt) - 1, len(part.tokens))
        ]
        return Packed(ids, hidden, rotary, places, torch.tensor(rows, device=self.device))

    def _ids(self, places: Sequence[Place]) -> torch.Tensor:
        return torch.tensor([t for p in places for t in p.tokens], device=self.device)

    def _tables(self, places: Sequence[Place]) -> tuple[torch.Tensor, torch.Tensor]:
        positions = [len(p.prefix) + i for p in places for i in range(len(p.tokens))]
        like = self._head.weight[:1]
        with fp32_products("ieee"):  # angles come from a product, and may not be rounded
            cos, sin = self._rotary(like, torch.tensor([positions], device=self.device))
        return cos[0], sin[0]

    def log_probs(
        self, upper: Upper, sequences: Sequence[Example], *, keep: bool = True
    ) -> torch.Tensor:
        """Log-probabilities [answer tokens of all sequences, vocabulary], in nats."""
        head = self._head if upper.head is None else upper.head
        packed = self.pack(sequences, keep=keep)
        with self._narrow():
            hidden = upper(packed)
        return torch.log_softmax(head(hidden), dim=-1)
