"""Sampled texts are what the model says after each, whatever stands beside it in the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import LlamaForCausalLM

from cloud.learners.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_END, _CAP = 2, 6
_COLD = 1e-4  # draws the most likely token
_COMMON = (1, 20, 21, 22, 23)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LlamaForCausalLM:
    made: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return made  # in evaluation mode, as `from_pretrained` leaves it


def said(model: LlamaForCausalLM, texts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    return sample(model, texts, temperature=_COLD, cap=_CAP, end=_END, seed=0)


@torch.no_grad()
def most_likely(model: LlamaForCausalLM, text: Sequence[int]) -> tuple[int, ...]:
    """Token by token, alone, without a cache."""
    ids = list(text)
    while len(ids) < len(text) + _CAP and (len(ids) == len(text) or ids[-1] != _END):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(text) :])


@pytest.mark.parametrize(
    "texts",
    [
        [(*_COMMON, 40), (*_COMMON, 50, 51, 52, 53), (*_COMMON, 60, 61)],
        [(30, 31), (40, 41, 42, 43), (50,)],
        [(*_COMMON, 40), (*_COMMON, 40), (*_COMMON, 40)],
        [_COMMON, (*_COMMON, 40, 41)],
        [_COMMON],
        [(7,)],
    ],
    ids=["a common beginning", "none", "all alike", "one begins another", "one", "one token"],
)
def test_each_text_is_followed_by_what_the_model_says_alone(
    model: LlamaForCausalLM, texts: list[tuple[int, ...]]
) -> None:
    assert said(model, texts) == [most_likely(model, text) for text in texts]
