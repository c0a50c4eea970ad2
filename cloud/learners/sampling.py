"""Sampled answers of a torch model, many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edge.student.prefix import shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Cache, GenerationConfig, LlamaForCausalLM


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
    # What all begin with is read once: of a short request the system prompt is the most.
    same = _beginning(texts)
    common, rests = list(texts[0][:same]), [t[same:] for t in texts]
    longest = max(len(rest) for rest in rests)
    ids = torch.full((len(texts), longest), end)
    seen = torch.zeros_like(ids)
    for row, rest in enumerate(rests):
        ids[row, longest - len(rest) :] = torch.tensor(rest)
        seen[row, longest - len(rest) :] = 1
    begin = torch.tensor([common], dtype=torch.long, device=model.device)
    again = begin.expand(len(texts), -1)
    torch.manual_seed(seed)
    out = model.generate(
        input_ids=torch.cat([again, ids.to(model.device)], 1),
        attention_mask=torch.cat([torch.ones_like(again), seen.to(model.device)], 1),
        generation_config=_generation(temperature, cap, end),
        past_key_values=_read(model, begin, len(texts)),
        use_model_defaults=False,  # or a model's own top_p and the like were added to ours
    )
    answers = []
    for row in out[:, same + longest :].tolist():
        length = row.index(end) + 1 if end in row else len(row)
        answers.append(tuple(row[:length]))
    return answers


def _beginning(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with; each keeps at least one that is read for it alone.

    >>> _beginning([(1, 2, 3), (1, 2, 4)]), _beginning([(1, 2), (1, 2)]), _beginning([(1,), (2,)])
    (2, 1, 0)
    """
    same = min(shared(texts[0], text) for text in texts)
    return max(0, min(same, min(map(len, texts)) - 1))


def _read(model: LlamaForCausalLM, begin: torch.Tensor, rows: int) -> Cache | None:
    """What the model keeps of ``begin`` [1, tokens], for so many rows; None of nothing."""
    if not begin.shape[1]:
        return None
    cache: Cache = model(begin, use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(rows)
    return cache


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
