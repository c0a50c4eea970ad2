"""Write a student bundle, and write new weights into an existing one on its frozen scales."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from cloud.students import graph, quantize
from cloud.students.layout import Tensor, plan
from edge.student.bundle import read_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from cloud.students.source import Source
    from protos.harness import Harness

VERSION = 1
DEFAULT_CONTEXT = 2048


def export(
    source: Source,
    harness: Harness,
    out: Path,
    *,
    context: int = DEFAULT_CONTEXT,
    block: int = quantize.BLOCK,
) -> None:
    """Quantize a model once and write its bundle to the folder ``out``.

    Args:
        source: the model brought in; its weights become codes on scales made here.
        harness: written as ``harness.json``.
        out: folder to create; replaced whole if it exists.
        context: longest prompt plus answer in tokens, cut to what the model allows.
        block: weights that share a scale.
    """
    config = source.model.config
    context = min(context, config.max_position_embeddings)
    state = source.model.state_dict()
    tensors = plan(config, state, context, block)
    work = out.with_name(out.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _write_weights(
        work / "weights.bin", tensors, _quantized(tensors, state, block), _fixed(source, context)
    )
    (work / "graph.onnx").write_bytes(
        graph.build(config, tensors).SerializeToString(deterministic=True)
    )
    source.tokenizer.save(str(work / "tokenizer.json"), pretty=False)
    meta = _meta(source, tensors, context, block)
    (work / "student.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
    (work / "harness.json").write_bytes(harness.to_json())
    shutil.rmtree(out, ignore_errors=True)
    work.replace(out)


def _meta(source: Source, tensors: Sequence[Tensor], context: int, block: int) -> dict[str, Any]:
    config = source.model.config
    return {
        "version": VERSION,
        "name": source.name,
        "architecture": "llama",
        "chat_format": "chatml",
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_size": config.hidden_size // config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "context_length": context,
        "eos": list(source.eos),
        "quantization": {"bits": 8, "block": block, "zero_point": quantize.ZERO},
        "tensors": [t.to_json() for t in tensors],
    }


def stacked(tensor: Tensor, state: Mapping[str, torch.Tensor]) -> quantize.Weights:
    """A tensor's sources below one another, fp32."""
    parts = [state[s].detach().float().cpu().numpy() for s in tensor.sources]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _quantized(
    tensors: Sequence[Tensor], state: Mapping[str, torch.Tensor], block: int
) -> dict[str, np.ndarray[Any, Any]]:
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in tensors:
        if not tensor.sources:
            continue
        weight = stacked(tensor, state)
        if tensor.dtype == "uint8":
            scales = quantize.make_scales(weight, block)
            arrays[f"{tensor.name}.scales"] = scales
            arrays[tensor.name] = quantize.encode(weight, scales)
        else:
            arrays[tensor.name] = weight
    return arrays


def _fixed(source: Source, context: int) -> dict[str, np.ndarray[Any, Any]]:
    config = source.model.config
    half = config.hidden_size // config.num_attention_heads // 2
    rates = 1.0 / config.rope_theta ** (np.arange(half, dtype=np.float64) / half)
    angles = np.outer(np.arange(context, dtype=np.float64), rates)
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def _write_weights(
    path: Path, tensors: Sequence[Tensor], *groups: dict[str, np.ndarray[Any, Any]]
) -> None:
    arrays = {name: array for group in groups for name, array in group.items()}
    with path.open("wb") as file:
        for tensor in tensors:
            file.seek(tensor.offset)
            file.write(np.ascontiguousarray(arrays[tensor.name]).tobytes())
        file.flush()
        os.fsync(file.fileno())


def tensors_of(bundle: Path) -> dict[str, Tensor]:
    """The layout of a bundle's ``weights.bin``, by tensor name."""
    return {raw["name"]: Tensor.from_json(raw) for raw in read_config(bundle)["tensors"]}


def given(layout: Mapping[str, Tensor], state: Mapping[str, torch.Tensor]) -> Iterator[Tensor]:
    """The tensors whose every source is in ``state``: what is written from it."""
    for tensor in layout.values():
        if tensor.sources and all(s in state for s in tensor.sources):
            yield tensor


def read_tensor(bundle: Path, tensor: Tensor) -> np.ndarray[Any, Any]:
    """One tensor of a bundle, mapped read-only."""
    path, dtype = bundle / "weights.bin", np.dtype(tensor.dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=tensor.offset, shape=tensor.shape)


def write_back(base: Path, state: Mapping[str, torch.Tensor], harness: Harness, out: Path) -> int:
    """Write a bundle with new weights on the base's frozen scales.

    Only tensors whose every source is in ``state`` are rewritten: what was not trained keeps its
    bytes.

    Args:
        base: the bundle that holds the scales, graph and tokenizer.
        state: trained parameters by their torch name, fp32 masters.
        harness: written as ``harness.json``.
        out: folder to create; replaced whole if it exists.

    Returns:
        How many codes differ from the base's.
    """
    work = out.with_name(out.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base, work)
    (work / "harness.json").write_bytes(harness.to_json())
    layout, changed = tensors_of(base), 0
    with (work / "weights.bin").open("r+b") as file:
        for tensor in given(layout, state):
            array: np.ndarray[Any, Any] = stacked(tensor, state)
            if tensor.dtype == "uint8":
                scales = read_tensor(base, layout[f"{tensor.name}.scales"])
                array = quantize.encode(array, scales)
                changed += int((array != read_tensor(base, tensor)).sum())
            file.seek(tensor.offset)
            file.write(np.ascontiguousarray(array).tobytes())
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(out, ignore_errors=True)
    work.replace(out)
    return changed
