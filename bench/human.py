"""Commands that people wrote for Home Assistant, and every answer to each that counts as right.

They are Home Assistant's own test sentences (``../shared/data/home/human_en.jsonl``): what its
contributors thought that people say. A command belongs here when its answer satisfies the schema
of one of our skills (``cloud.demo.commands.skill_schema``); floors, fans, named timers and the
like, which no skill of ours has, are left out.

Some of these sentences are also walks through the templates that training draws from. So that they
stay unseen, pass ``[c.text for c in load(data)]`` as ``exclude`` to ``cloud.demo.commands.sample``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jsonschema

from cloud.demo.commands import render, skill_schema
from cloud.demo.grammar import SKILLS
from protos.errors import InvalidInputError
from protos.prompt import Message, chat

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from edge.student.runtime import Student

_IMPLIED = {"HassLightSet": "light", "HassSetPosition": "cover"}
"""Intents about one domain only: the grammar's readings name it sometimes, people's never must."""


@dataclass(frozen=True)
class HumanCommand:
    """What a person wrote, the skill that covers it, and every answer that counts as right.

    ``accepted`` are tool calls as ``cloud.demo.commands.render`` writes them.
    """

    text: str
    skill: str
    accepted: frozenset[str]


def load(data: Path) -> list[HumanCommand]:
    """The commands that our skills cover, in the file's order; ``data`` has ``home/`` in it.

    Raises:
        InvalidInputError: ``data`` does not hold the file.
    """
    path = data / "home" / "human_en.jsonl"
    if not path.is_file():
        msg = (
            f"{path} is not there: the benchmark's data is no part of the repository; make it of "
            "tests/en of github's home-assistant/intents (docs/learning.md, Measure it yourself)"
        )
        raise InvalidInputError(msg)
    validators = {name: jsonschema.Draft202012Validator(skill_schema([name])) for name in SKILLS}
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        skill = _skill(raw, validators)
        if skill is not None:
            found.append(HumanCommand(raw["input"], skill, accepted(raw)))
    return found


def accepted(raw: Mapping[str, Any]) -> frozenset[str]:
    """Every right answer to a row of the file, as text.

    A room that only the speaker's place tells (``context.area``) may be named or not; so may the
    domain of an intent that has no other.
    """
    name, slots = raw["output"]["name"], raw["output"]["arguments"]
    readings = [slots]
    area, place = slots.get("area"), raw.get("context", {}).get("area")
    if area and place and area == place.lower() and area not in raw["input"].lower():
        readings.append({key: value for key, value in slots.items() if key != "area"})
    return frozenset(render(name, each) for slots in readings for each in _domains(name, slots))


def exact(student: Student, commands: Sequence[HumanCommand]) -> list[bool]:
    """Whether a student answers each command with an accepted answer, to the letter.

    It answers greedily, with its own harness and without working memory.
    """
    system, limit = student.harness.system, student.harness.max_tokens
    chats = [chat(system, [Message("user", c.text)]) for c in commands]
    answers = student.answer_all(chats, limit)
    return [a.text in c.accepted for a, c in zip(answers, commands, strict=True)]


def _domains(name: str, slots: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield slots
    if name in _IMPLIED:
        yield {**slots, "domain": _IMPLIED[name]}
        yield {key: value for key, value in slots.items() if key != "domain"}


def _skill(
    raw: Mapping[str, Any], validators: Mapping[str, jsonschema.Draft202012Validator]
) -> str | None:
    """The skill that covers a row of the file, or None."""
    call = json.loads(render(raw["output"]["name"], raw["output"]["arguments"]))
    for name, validator in validators.items():
        if validator.is_valid(call):
            domain = raw.get("context", {}).get("domain")  # of a thing that is named, if known
            if domain is None or domain in SKILLS[name].domains:
                return name
    return None
