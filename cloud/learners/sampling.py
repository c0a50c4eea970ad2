"""Sampled answers of a torch model, many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import GenerationConfig, LlamaForCausalLM


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    texts: Sequence[Sequence[int]],
    *,
    temperature: float,
    cap: int,
    end: int,
    seed: int,
) -> list[tuple[int, ...]]:
    """What the model says after each of ``texts`` (token ids), drawn at ``temperature``.

    Each is at most ``cap`` tokens, its last the token ``end`` unless ``cap`` cut it.
    """
    longest = max(len(t) for t in texts)
    ids = torch.full((len(texts), longest), end)
    seen = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, longest - len(text) :] = torch.tensor(text)
        seen[row, longest - len(text) :] = 1
    torch.manual_seed(seed)
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=seen.to(model.device),
        generation_config=_generation(temperature, cap, end),
        use_model_defaults=False,  # or a model's own top_p and the like were added to ours
    )
    answers = []
    for row in out[:, longest:].tolist():
        length = row.index(end) + 1 if end in row else len(row)
        answers.append(tuple(row[:length]))
    return answers


def _generation(temperature: float, cap: int, end: int) -> GenerationConfig:
    from transformers import GenerationConfig  # noqa: PLC0415  # seconds that others save

    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=cap,
        eos_token_id=end,
        pad_token_id=end,
    )
