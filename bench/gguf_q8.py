"""Write a student's fp32 weights as a Q8_0 GGUF file, for llama.cpp.

Q8_0 is symmetric 8-bit codes as ours are, in blocks of 32 with fp16 scales where ours are of 64
with fp32 scales. Tokenizer and architecture are copied from the GGUF file that was imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from edge.delta.files import TEMPORARY

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WRITTEN_BY_THE_WRITER = ("GGUF.", "general.architecture", "general.file_type")


def write(original: Path, state: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write ``state`` (torch names, fp32) to ``out``, with the metadata of ``original``."""
    reader = gguf.GGUFReader(original)
    work = out.with_name(out.name + TEMPORARY)
    writer = gguf.GGUFWriter(work, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    heads = {}
    for name, field in reader.fields.items():
        if name.startswith(_WRITTEN_BY_THE_WRITER):
            continue
        if name.startswith("llama.attention.head_count"):
            heads["attn_k" if name.endswith("_kv") else "attn_q"] = int(field.contents())
        kind, sub = field.types[0], field.types[-1]
        if kind is gguf.GGUFValueType.ARRAY:
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)
        else:
            writer.add_key_value(name, field.contents(), kind)
    for name, weight in state.items():
        _add(writer, name, weight.float().numpy(), heads)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    work.replace(out)


def _add(
    writer: gguf.GGUFWriter, name: str, weight: np.ndarray[Any, Any], heads: Mapping[str, int]
) -> None:
    stem = name.removesuffix(".weight")
    if stem in _NAMES:
        target = _NAMES[stem]
    else:
        _, _, layer, part = stem.split(".", 3)
        kind = _LAYER_NAMES[part]
        target = f"blk.{layer}.{kind}"
        if kind in heads:
            weight = _permute(weight, heads[kind])
    if weight.ndim == 1:
        writer.add_tensor(f"{target}.weight", weight)
        return
    quantized = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor(
        f"{target}.weight", gguf.quants.quantize(weight, quantized), raw_dtype=quantized
    )


def _permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """GGUF's interleaving of rotary pairs: rows (head, 2, pair) become (head, pair, 2)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))
