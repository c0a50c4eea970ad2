"""Skills that benchmarks teach in sequence: home commands of several kinds, and invented facts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.facts import facts
from cloud.demo.commands import sample
from cloud.demo.homes import HOMES
from protos.harness import Harness
from protos.prompt import Message, Shown

if TYPE_CHECKING:
    from collections.abc import Collection

FACTS = "facts"
SYSTEM = (
    "You run a smart home. Answer a command with one JSON tool call, "
    "and a question about the house in few words."
)
HELD_OUT = 8


@dataclass(frozen=True)
class Material:
    """One skill: what is learnt, what only measures the teacher, and what nobody trains on."""

    name: str
    train: tuple[Shown, ...]
    held_out: tuple[Shown, ...]
    tests: tuple[Shown, ...]


def harness() -> Harness:
    """What the student is told; no schema, because facts are answered in plain words."""
    return Harness(system=SYSTEM, max_tokens=40)


def material(
    name: str, seed: int, *, train: int, tests: int, exclude: Collection[str] = ()
) -> Material:
    """A skill's demonstrations; ``seed`` decides what is learnt and what is asked.

    Of commands there are ``train`` to learn; of facts, four wordings of each of forty. ``tests``
    bounds what is asked: commands that are not among the learnt, and facts in words that training
    never used. ``exclude`` are texts that are neither learnt nor asked.
    """
    rng = random.Random(f"{name} {seed}")
    if name == FACTS:
        known = facts(seed)
        learn = [_shown(question, fact.answer) for fact in known for question in fact.train]
        asked = [_shown(question, fact.answer) for fact in known for question in fact.test]
        rng.shuffle(learn)
        rng.shuffle(asked)
        return Material(
            name, tuple(learn), tuple(asked[-HELD_OUT:]), tuple(asked[:-HELD_OUT][:tests])
        )
    drawn = sample(name, HOMES, train + HELD_OUT + tests, rng, exclude)
    shown = [_shown(command.text, command.answer) for command in drawn]
    rng.shuffle(shown)
    return Material(
        name,
        tuple(shown[:train]),
        tuple(shown[train : train + HELD_OUT]),
        tuple(shown[train + HELD_OUT :]),
    )


def _shown(request: str, answer: str) -> Shown:
    return Shown((Message("user", request),), answer)
