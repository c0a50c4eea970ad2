"""Does the exported file say what the torch model says?

The file answers fifty general prompts greedily; torch is led along the same tokens (teacher
forcing), and at every token its own choice and its distribution are compared. Letting each decode
freely would compare little but the place of their first difference. The answers are kept: they are
what anchors and the gate hold a student to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cloud.gate.gate import log_softmax
from cloud.learners.prompts import ANCHOR, GATE, SYSTEM
from edge.student.runtime import Student
from protos.prompt import Message, chat, render

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from cloud.students.source import Source

PROMPTS = ANCHOR + GATE
ANSWER_TOKENS = 48
"""The most of an answer; a longer one is cut there."""
_COMPARED = 24


@dataclass(frozen=True)
class Agreement:
    """Over ``tokens`` greedy tokens of ``prompts`` answers: equal share, mean KL in nats."""

    prompts: int
    tokens: int
    equal_share: float
    mean_kl: float


def answers(bundle: Path) -> dict[str, str]:
    """The student's own greedy answers to :data:`PROMPTS`.

    Raises:
        IntegrityError: the bundle cannot be opened.
    """
    student = Student.open(bundle)
    chats = [chat(SYSTEM, [Message("user", p)]) for p in PROMPTS]
    said = student.answer_all(chats, ANSWER_TOKENS)
    student.close()
    return {p: a.text for p, a in zip(PROMPTS, said, strict=True)}


@torch.no_grad()
def compare(
    source: Source, bundle: Path, said: Mapping[str, str], progress: Callable[[float], None]
) -> Agreement:
    """Compare a torch model with its bundle along the bundle's answers.

    Args:
        source: the torch model.
        bundle: the exported file.
        said: its :func:`answers`.
        progress: is told the part done, 0..1.

    Raises:
        IntegrityError: the bundle cannot be opened.
    """
    student = Student.open(bundle)
    equal, kls = 0, []
    for done, (prompt, answer) in enumerate(said.items(), 1):
        messages = chat(SYSTEM, [Message("user", prompt)])
        first = len(student.encode(messages)) - 1
        ids = student.tokenizer.encode(render(messages) + answer, add_special_tokens=False).ids
        ids = ids[: first + _COMPARED]
        reference = source.model(torch.tensor([ids])).logits[0, first:].numpy()
        ours = log_softmax(reference)
        theirs = log_softmax(student.logits(ids, first))
        equal += int((theirs.argmax(axis=1) == ours.argmax(axis=1)).sum())
        kls += (np.exp(ours) * (ours - theirs)).sum(axis=1).tolist()
        progress(done / len(said))
    student.close()
    return Agreement(len(said), len(kls), equal / len(kls), float(np.mean(kls)))
