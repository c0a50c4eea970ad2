"""The fused ONNX graph of a Llama-family student.

One ``GroupQueryAttention`` and five ``MatMulNBits`` a layer (ONNX Runtime's contrib operators), the
embedding gathered from the head's own codes where the two are tied. All weights are external.

Inputs: ``input_ids`` int64 [batch, length]; ``seqlens_k`` int32 [batch], the index of each row's
last valid position; ``total_length`` int32 scalar, length of the longest row with its past;
``rows`` int64 [n], the flattened positions whose logits are wanted; ``past.<i>.key`` and
``.value`` float [batch, kv_heads, capacity, head_size]. Outputs: ``logits`` float [n, vocabulary]
and ``present.*``, which may share the buffers of ``past.*``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onnx import ModelProto, StringStringEntryProto, TensorProto, helper

from cloud.students.layout import EMBEDDING, HEAD, Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onnx import NodeProto, ValueInfoProto
    from transformers import LlamaConfig

_CONTRIB = "com.microsoft"
_TYPES = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}
WEIGHTS = "weights.bin"


class _Builder:
    """Collects nodes; every method appends one and returns its output's name."""

    def __init__(self, config: LlamaConfig, tensors: Sequence[Tensor]) -> None:
        self.config = config
        self.tensors = {t.name: t for t in tensors}
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def external(self, name: str, shape: Sequence[int] | None = None, alias: str = "") -> str:
        tensor = self.tensors[name]
        proto = TensorProto(
            name=alias or name, data_type=_TYPES[tensor.dtype], data_location=TensorProto.EXTERNAL
        )
        proto.dims.extend(tensor.shape if shape is None else shape)
        for key, value in (
            ("location", WEIGHTS),
            ("offset", tensor.offset),
            ("length", tensor.size),
        ):
            proto.external_data.append(StringStringEntryProto(key=key, value=str(value)))
        self.initializers.append(proto)
        return proto.name

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attrs: Any) -> str:  # noqa: ANN401
        domain = attrs.pop("domain", _CONTRIB)
        self.nodes.append(
            helper.make_node(
                op, inputs, outputs, name=outputs[0] or outputs[-1], domain=domain, **attrs
            )
        )
        return outputs[0]

    def matmul(self, x: str, name: str) -> str:
        rows, columns = self.tensors[name].shape
        blocks = self.tensors[f"{name}.scales"].shape[1]
        codes = self.external(name, (rows, blocks, columns // blocks))
        scales = self.external(f"{name}.scales")
        return self.node(
            "MatMulNBits",
            [x, codes, scales],
            [f"{name}.out"],
            N=rows,
            K=columns,
            bits=8,
            block_size=columns // blocks,
            accuracy_level=4,  # activations in int8 too
        )

    def embed(self, ids: str) -> str:
        table = HEAD if self.config.tie_word_embeddings else EMBEDDING
        columns, blocks = self.tensors[table].shape[1], self.tensors[f"{table}.scales"].shape[1]
        codes = self.external(table, alias="embedding.codes")
        scales = self.external(f"{table}.scales", alias="embedding.scales")
        return self.node(
            "GatherBlockQuantized",
            [codes, ids, scales],
            ["embedded"],
            gather_axis=0,
            quantize_axis=1,
            block_size=columns // blocks,
            bits=8,
        )

    def add_norm(self, residual: str, x: str | None, norm: str) -> tuple[str, str]:
        """Normalise ``residual + x``; returns (normalised, sum)."""
        eps = self.config.rms_norm_eps
        weight, out = self.external(norm), f"{norm}.out"
        if x is None:
            domain = ""  # registered by ONNX Runtime under the default domain
            op = "SimplifiedLayerNormalization"
            self.node(
                op, [residual, weight], [out], domain=domain, axis=-1, epsilon=eps, stash_type=1
            )
            return out, residual
        total = f"{norm}.sum"
        self.node(
            "SkipSimplifiedLayerNormalization",
            [residual, x, weight],
            [out, "", "", total],
            epsilon=eps,
        )
        return out, total

    def attention(self, i: int, qkv: str) -> str:
        config = self.config
        out = f"layer.{i}.attention"
        inputs = [qkv, "", "", f"past.{i}.key", f"past.{i}.value", "seqlens_k", "total_length"]
        self.node(
            "GroupQueryAttention",
            [*inputs, "cos", "sin"],
            [out, f"present.{i}.key", f"present.{i}.value"],
            num_heads=config.num_attention_heads,
            kv_num_heads=config.num_key_value_heads,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return out

    def mlp(self, i: int, x: str) -> str:
        gate, up = self.matmul(x, f"layer.{i}.gate"), self.matmul(x, f"layer.{i}.up")
        sigmoid = self.node("Sigmoid", [gate], [f"layer.{i}.sigmoid"], domain="")
        silu = self.node("Mul", [gate, sigmoid], [f"layer.{i}.silu"], domain="")
        hidden = self.node("Mul", [silu, up], [f"layer.{i}.hidden"], domain="")
        return self.matmul(hidden, f"layer.{i}.down")


def build(config: LlamaConfig, tensors: Sequence[Tensor]) -> ModelProto:
    """Build the graph for weights laid out as ``tensors``."""
    b = _Builder(config, tensors)
    b.external("cos")
    b.external("sin")
    residual, update = b.embed("input_ids"), None
    for i in range(config.num_hidden_layers):
        x, residual = b.add_norm(residual, update, f"layer.{i}.norm1")
        update = b.matmul(b.attention(i, b.matmul(x, f"layer.{i}.qkv")), f"layer.{i}.o")
        x, residual = b.add_norm(residual, update, f"layer.{i}.norm2")
        update = b.mlp(i, x)
    x, _ = b.add_norm(residual, update, "norm")
    flat = _constant(b, "flat", [-1, config.hidden_size])
    x = b.node("Reshape", [x, flat], ["positions"], domain="")
    x = b.node("Gather", [x, "rows"], ["wanted"], domain="", axis=0)
    logits = b.matmul(x, HEAD)
    graph = helper.make_graph(
        b.nodes, "student", _inputs(config), _outputs(config, logits), b.initializers
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="anabranch")


def _constant(b: _Builder, name: str, values: list[int]) -> str:
    b.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    return name


def _cache(config: LlamaConfig, kind: str) -> list[ValueInfoProto]:
    size = config.hidden_size // config.num_attention_heads
    shape = ["batch", config.num_key_value_heads, "capacity", size]
    return [
        helper.make_tensor_value_info(f"{kind}.{i}.{part}", TensorProto.FLOAT, shape)
        for i in range(config.num_hidden_layers)
        for part in ("key", "value")
    ]


def _inputs(config: LlamaConfig) -> list[ValueInfoProto]:
    info = helper.make_tensor_value_info
    return [
        info("input_ids", TensorProto.INT64, ["batch", "length"]),
        info("seqlens_k", TensorProto.INT32, ["batch"]),
        info("total_length", TensorProto.INT32, []),
        info("rows", TensorProto.INT64, ["wanted"]),
        *_cache(config, "past"),
    ]


def _outputs(config: LlamaConfig, logits: str) -> list[ValueInfoProto]:
    shape = ["wanted", config.vocab_size]
    return [
        helper.make_tensor_value_info(logits, TensorProto.FLOAT, shape),
        *_cache(config, "present"),
    ]
