"""The tensors of a student and their places in ``weights.bin``.

Graph, export and trainer all read this one list, so a tensor's name, shape and source are stated
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import LlamaConfig

from cloud.students.quantize import BLOCK

# ONNX Runtime maps external data into memory only where it begins on a page.
ALIGNMENT = 4096
HEAD = "head"
EMBEDDING = "embedding"


@dataclass(frozen=True)
class Tensor:
    """One tensor of ``weights.bin``; ``offset`` and ``size`` in bytes.

    ``sources`` are the torch parameters stacked by rows in it; empty for scales (frozen) and for
    the rotary tables (computed).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    sources: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The entry of ``student.json``."""
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "offset": self.offset,
            "size": self.size,
            "sources": list(self.sources),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Tensor:
        """Read an entry of ``student.json``."""
        return cls(
            raw["name"],
            raw["dtype"],
            tuple(raw["shape"]),
            raw["offset"],
            raw["size"],
            tuple(raw["sources"]),
        )


def matrices(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """Quantized matrices in file order: name to the torch parameters stacked in it."""
    out: dict[str, tuple[str, ...]] = {}
    tied = config.tie_word_embeddings
    out[HEAD] = ("model.embed_tokens.weight",) if tied else ("lm_head.weight",)
    if not tied:
        out[EMBEDDING] = ("model.embed_tokens.weight",)
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        out[f"layer.{i}.qkv"] = tuple(f"{p}self_attn.{x}_proj.weight" for x in "qkv")
        out[f"layer.{i}.o"] = (f"{p}self_attn.o_proj.weight",)
        out[f"layer.{i}.gate"] = (f"{p}mlp.gate_proj.weight",)
        out[f"layer.{i}.up"] = (f"{p}mlp.up_proj.weight",)
        out[f"layer.{i}.down"] = (f"{p}mlp.down_proj.weight",)
    return out


def norms(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """Norm vectors in file order, kept in fp32."""
    out: dict[str, tuple[str, ...]] = {}
    for i in range(config.num_hidden_layers):
        out[f"layer.{i}.norm1"] = (f"model.layers.{i}.input_layernorm.weight",)
        out[f"layer.{i}.norm2"] = (f"model.layers.{i}.post_attention_layernorm.weight",)
    out["norm"] = ("model.norm.weight",)
    return out


def plan(
    config: LlamaConfig, state: Mapping[str, torch.Tensor], context: int, block: int = BLOCK
) -> list[Tensor]:
    """Place every tensor in ``weights.bin``.

    Codes come first in the order of the layers, then scales, norms and rotary tables: what releases
    change lies together, what never changes lies behind it.
    """
    head_size = config.hidden_size // config.num_attention_heads
    shapes: list[tuple[str, str, tuple[int, ...], tuple[str, ...]]] = []
    scales: list[tuple[str, str, tuple[int, ...], tuple[str, ...]]] = []
    for name, sources in matrices(config).items():
        rows = sum(state[s].shape[0] for s in sources)
        columns = state[sources[0]].shape[1]
        shapes.append((name, "uint8", (rows, columns), sources))
        scales.append((f"{name}.scales", "float32", (rows, columns // block), ()))
    vectors = [(n, "float32", tuple(state[s[0]].shape), s) for n, s in norms(config).items()]
    rotary: list[tuple[str, str, tuple[int, ...], tuple[str, ...]]] = [
        (n, "float32", (context, head_size // 2), ()) for n in ("cos", "sin")
    ]
    tensors, offset = [], 0
    for name, dtype, shape, sources in (*shapes, *scales, *vectors, *rotary):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        tensors.append(Tensor(name, dtype, shape, offset, size, sources))
        offset = -(-(offset + size) // ALIGNMENT) * ALIGNMENT
    return tensors
