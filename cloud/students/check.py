"""Does the exported file say what the torch model says?

Torch answers fifty prompts greedily; the file is led along the same tokens (teacher forcing), and
at every token its own choice and its distribution are compared. Letting each decode freely would
compare little but the place of their first difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cloud.gate.gate import log_softmax
from cloud.learners.prompts import ANCHOR, GATE, SYSTEM
from edge.student.runtime import Student
from protos.prompt import Message, chat

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cloud.students.source import Source

PROMPTS = ANCHOR + GATE
_TOKENS = 24
_BATCH = 10


@dataclass(frozen=True)
class Agreement:
    """Over ``tokens`` greedy tokens of ``prompts`` answers: equal share, mean KL in nats."""

    prompts: int
    tokens: int
    equal_share: float
    mean_kl: float


@torch.no_grad()
def compare(source: Source, bundle: Path, progress: Callable[[float], None]) -> Agreement:
    """Compare a torch model with its bundle on fifty prompts.

    Raises:
        IntegrityError: the bundle cannot be opened.
    """
    student = Student.open(bundle)
    equal, kls = 0, []
    for start in range(0, len(PROMPTS), _BATCH):
        prompts = [
            student.encode(chat(SYSTEM, [Message("user", p)]))
            for p in PROMPTS[start : start + _BATCH]
        ]
        for prompt, answer in zip(prompts, _greedy(source, prompts), strict=True):
            ids = prompt + answer
            first = len(prompt) - 1
            reference = source.model(torch.tensor([ids[:-1]])).logits[0, first:].numpy()
            ours = log_softmax(reference)
            theirs = log_softmax(student.logits(ids[:-1], first))
            equal += int((theirs.argmax(axis=1) == ours.argmax(axis=1)).sum())
            kls += (np.exp(ours) * (ours - theirs)).sum(axis=1).tolist()
        progress((start + len(prompts)) / len(PROMPTS))
    student.close()
    return Agreement(len(PROMPTS), len(kls), equal / len(kls), float(np.mean(kls)))


def _greedy(source: Source, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers of the torch model, the end-of-answer token included."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, as generation needs it
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    out = source.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=_TOKENS,
        do_sample=False,
        eos_token_id=list(source.eos),
        pad_token_id=source.eos[0],
    )
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i + 1 for i, t in enumerate(row) if t in source.eos), len(row))
        answers.append(row[:end])
    return answers
