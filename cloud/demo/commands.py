"""Real English home commands with the tool call that each one means.

Sentences are walks through Home Assistant's own templates; what a sentence means is what hassil's
recogniser says of it in its home. A sentence is kept only when the recogniser has one reading,
the one that was sampled.
"""

import json
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import hassil

from cloud.demo.grammar import Block, blocks_of, draw, english, slot_lists
from cloud.demo.homes import Home

Json = dict[str, Any]

_TRIES = 1000
"""Walks without a new sentence after which an intent counts as exhausted."""

_POLITE = 0.06
"""Share of sentences that end in please, and the share of those that open with it or its like."""

_VERBS = re.compile(
    "(turn|switch|set|change|make|activate|deactivate|open|close|shut|raise|lower"
    "|pause|resume|skip|mute|unmute|start|stop|cancel|add|adjust) "
)


@dataclass(frozen=True)
class Command:
    """What a person says, the right answer to it, and that answer's intent."""

    text: str
    answer: str
    intent: str


def sample(
    skill: str,
    homes: Sequence[Home] | Home,
    count: int,
    rng: random.Random,
    exclude: Collection[str] = (),
) -> list[Command]:
    """Return `count` different commands of a skill, as evenly over its intents as they allow.

    Two sentences are the same when they differ in case and punctuation only; none is in
    `exclude`. The same arguments and state of `rng` give the same commands.

    Raises:
        ValueError: no such skill, no homes, or fewer than `count` sentences can be found.

    >>> from cloud.demo.homes import HOME_A
    >>> sorted(command.intent for command in sample("lights", HOME_A, 2, random.Random(1)))
    ['HassTurnOff', 'HassTurnOn']
    """
    blocks = blocks_of(skill)
    homes = (homes,) if isinstance(homes, Home) else tuple(homes)
    if not homes:
        message = "no homes to sample commands from; pass one, such as cloud.demo.homes.HOME_A"
        raise ValueError(message)
    seen = {_fold(text) for text in exclude}
    found: list[Command] = []
    live = rng.sample(tuple(blocks), len(blocks))
    while len(found) < count and live:
        for intent in tuple(live[: count - len(found)]):
            command = _fresh(blocks[intent], homes, rng, seen)
            if command is None:
                live.remove(intent)
            else:
                found.append(command)
    if len(found) < count:
        message = (
            f"only {len(found)} of {count} {skill} commands found beside {len(exclude)} excluded "
            f"in home {', '.join(home.name for home in homes)}; ask for fewer, exclude fewer or "
            "add homes"
        )
        raise ValueError(message)
    rng.shuffle(found)
    return found


def truth(text: str, home: Home) -> str | None:
    """Return the tool call that `text` means in `home`, or None when it means none or several.

    >>> from cloud.demo.homes import HOME_A
    >>> truth("please turn on the kitchen lights", HOME_A)
    '{"name":"HassTurnOn","arguments":{"area":"kitchen","domain":"light"}}'
    """
    readings = _readings(text, home)
    return next(iter(readings)) if len(readings) == 1 else None


@lru_cache(maxsize=1 << 14)
def _readings(text: str, home: Home) -> frozenset[str]:
    return frozenset(
        render(result.intent.name, {key: match.value for key, match in result.entities.items()})
        for result in hassil.recognize_all(text, english(), slot_lists=slot_lists(home))
    )


def render(intent: str, slots: Mapping[str, object]) -> str:
    """Return a tool call as compact JSON: keys sorted, text lower-case, whole numbers as integers.

    >>> render("HassSetVolume", {"volume_level": 30.0, "name": "TV"})
    '{"name":"HassSetVolume","arguments":{"name":"tv","volume_level":30}}'
    """
    arguments = {key: _plain(slots[key]) for key in sorted(slots)}
    call = {"name": intent, "arguments": arguments}
    return json.dumps(call, separators=(",", ":"), ensure_ascii=False)


def skill_schema(skills: Sequence[str]) -> Json:
    """Return the JSON schema (draft 2020-12) that every answer of these skills satisfies.

    Raises:
        ValueError: no such skill.

    >>> skill_schema(["timers"])["properties"]["arguments"]["properties"]["hours"]
    {'type': 'integer', 'minimum': 1, 'maximum': 100}
    """
    intents: dict[str, None] = {}
    kinds: dict[str, list[Json]] = {}
    for skill in skills:
        for intent, blocks in blocks_of(skill).items():
            intents[intent] = None
            for key, kind in (pair for block in blocks for pair in _kinds(block)):
                if kind not in kinds.setdefault(key, []):
                    kinds[key].append(kind)
    arguments = {
        key: found[0] if len(found) == 1 else {"anyOf": found}
        for key, found in sorted(kinds.items())
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "name": {"enum": list(intents)},
            "arguments": {
                "type": "object",
                "properties": arguments,
                "additionalProperties": False,
            },
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _fresh(
    blocks: Sequence[Block], homes: Sequence[Home], rng: random.Random, seen: set[str]
) -> Command | None:
    """Return a command not in `seen` and add it there; None when none seems to be left."""
    for _ in range(_TRIES):
        block, home = rng.choice(blocks), rng.choice(homes)
        drawn = draw(block, home, rng)
        if drawn is None:
            continue
        text, answer = _polite(drawn[0], rng), render(block.intent, drawn[1])
        if _fold(text) not in seen and truth(text, home) == answer:
            seen.add(_fold(text))
            return Command(text, answer, block.intent)
    return None


def _polite(text: str, rng: random.Random) -> str:
    """Say please now and then."""
    roll = rng.random()
    if roll < _POLITE:
        return f"{text} please"
    if roll < 2 * _POLITE and _VERBS.match(text):
        return f"{rng.choice(('please', 'can you', 'could you'))} {text}"
    return text


def _fold(text: str) -> str:
    return " ".join(re.sub(r"[^\w%°\s]", "", text.casefold()).split())


def _plain(value: object) -> object:
    if isinstance(value, str):
        return value.lower()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _kinds(block: Block) -> Iterator[tuple[str, Json]]:
    """Yield the argument keys of a block, each with the JSON schema of its values."""
    for key, value in block.slots.items():
        yield key, {"enum": [_plain(value)]}
    for template in block.templates:
        if isinstance(template.expression, hassil.Group):
            for reference in template.expression.list_references(block.rules):
                yield reference.slot_name, _kind(block.lists.get(reference.list_name))


def _kind(values: hassil.SlotList | None) -> Json:
    if isinstance(values, hassil.RangeSlotList):
        ends = sorted(end * (values.multiplier or 1) for end in (values.start, values.stop))
        whole = values.fraction_type is None and all(float(end).is_integer() for end in ends)
        return {
            "type": "integer" if whole else "number",
            "minimum": _plain(ends[0]),
            "maximum": _plain(ends[1]),
        }
    if isinstance(values, hassil.TextSlotList):
        return {"enum": list(dict.fromkeys(_plain(value.value_out) for value in values.values))}
    return {"type": "string", "minLength": 1}
