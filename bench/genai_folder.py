"""A student's bundle as onnxruntime-genai wants it: the same weights file, its names and a config.

genai gives a graph ``attention_mask`` where ours takes ``seqlens_k`` and ``total_length``, and it
wants the logits of the last position only when asked so (its builder calls that a pruned head).
The few nodes that turn one into the other stand before the student's own.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto, helper

from edge.student.bundle import read_config

if TYPE_CHECKING:
    from pathlib import Path

_RENAMED = {"head.out": "logits"}


def make(bundle: Path, out: Path) -> None:
    """Make a genai folder of a bundle; the weights are a hard link or a copy."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in ("weights.bin", "tokenizer.json"):
        try:
            (out / name).hardlink_to(bundle / name)
        except OSError:
            shutil.copyfile(bundle / name, out / name)
    config = read_config(bundle)
    model = onnx.load(str(bundle / "graph.onnx"), load_external_data=False)
    _adapt(model.graph, config)
    onnx.save(model, out / "graph.onnx")
    (out / "genai_config.json").write_text(json.dumps(_genai(config), indent=1) + "\n")
    special: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
    }
    special |= {"bos_token": "<|im_start|>", "unk_token": "<|endoftext|>", "add_bos_token": False}
    (out / "tokenizer_config.json").write_text(json.dumps(special, indent=1) + "\n")


def _adapt(graph: onnx.GraphProto, config: dict[str, Any]) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = _RENAMED.get(name, name)
    kept = [i for i in graph.input if i.name not in ("seqlens_k", "total_length", "rows")]
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"])
    del graph.input[:]
    graph.input.extend([kept[0], mask, *kept[1:]])
    size = config["vocabulary"]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, size])
    others = [o for o in graph.output if o.name != "head.out"]
    del graph.output[:]
    graph.output.extend([logits, *others])
    _replace_gather(graph)
    before = [
        helper.make_node("ReduceSum", ["attention_mask", "axis1"], ["valid"], keepdims=0),
        helper.make_node("Sub", ["valid", "one"], ["valid_before"]),
        helper.make_node("Cast", ["valid_before"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"], start=1, end=2),
        helper.make_node("Squeeze", ["mask_shape"], ["total"]),
        helper.make_node("Cast", ["total"], ["total_length"], to=TensorProto.INT32),
    ]
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(
        [
            helper.make_tensor("axis1", TensorProto.INT64, [1], [1]),
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
            helper.make_tensor("as_batch", TensorProto.INT64, [3], [-1, 1, size]),
        ]
    )


def _replace_gather(graph: onnx.GraphProto) -> None:
    """Only the last position of the (one) row is wanted: ``rows`` becomes a constant."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == "rows":
                node.input[i] = "last"
        for i, name in enumerate(node.output):
            if name == "logits":
                node.output[i] = "flat_logits"
    graph.node.append(helper.make_node("Reshape", ["flat_logits", "as_batch"], ["logits"]))


def _genai(config: dict[str, Any]) -> dict[str, Any]:
    """``genai_config.json``: sizes, names, two threads, and the cache shared with its past."""
    decoder = {
        "session_options": {
            "log_id": "onnxruntime-genai",
            "intra_op_num_threads": 2,
            "inter_op_num_threads": 1,
            "provider_options": [],
        },
        "filename": "graph.onnx",
        "head_size": config["head_size"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["heads"],
        "num_hidden_layers": config["layers"],
        "num_key_value_heads": config["kv_heads"],
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past.%d.key",
            "past_value_names": "past.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            "type": "llama",
            "bos_token_id": 1,
            "eos_token_id": config["eos"],
            "pad_token_id": config["eos"][0],
            "context_length": config["context_length"],
            "vocab_size": config["vocabulary"],
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": config["context_length"],
            "past_present_share_buffer": True,
        },
    }
