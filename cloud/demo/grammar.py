"""Home Assistant's English templates, narrowed to what people say, and walks through them.

The narrowing (`_SPOKEN`, `Skill.spoken`, `_EDITS`, `_SKIPPED`, `_AWKWARD`) concerns sampling only:
what a sentence means is read with the templates as Home Assistant ships them (`english`).
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import hassil
from hassil.intents import IntentData
from home_assistant_intents import get_intents

from cloud.demo.homes import Home


@dataclass(frozen=True)
class Skill:
    """A named part of the grammar: intents, limited to things of some domains.

    `spoken` replaces grammar rules by what people use of them, for sampling only; a word that
    is repeated in it is that much more frequent.
    """

    intents: tuple[str, ...]
    domains: frozenset[str] = frozenset()
    spoken: Mapping[str, str] = field(default_factory=dict)


SKILLS: Mapping[str, Skill] = MappingProxyType(
    {
        "lights": Skill(
            ("HassTurnOn", "HassTurnOff"),
            frozenset({"light", "switch"}),
        ),
        "dimming": Skill(
            ("HassLightSet",),
            frozenset({"light"}),
            {"numeric_value_set": "(set|set|change|turn)"},
        ),
        "media": Skill(
            (
                "HassMediaPause",
                "HassMediaUnpause",
                "HassMediaNext",
                "HassMediaPrevious",
                "HassMediaPlayerMute",
                "HassMediaPlayerUnmute",
                "HassSetVolume",
                "HassSetVolumeRelative",
            ),
            frozenset({"media_player"}),
            {"numeric_value_set": "(set|set|change|turn up|turn down|increase|decrease)"},
        ),
        "climate": Skill(
            ("HassClimateSetTemperature", "HassClimateGetTemperature", "HassClimateSetFanMode"),
            frozenset({"climate"}),
            {"numeric_value_set": "(set|set|change)", "set": "(set|set|change)"},
        ),
        "covers": Skill(
            ("HassTurnOn", "HassTurnOff", "HassSetPosition"),
            frozenset({"cover"}),
            {
                "numeric_value_set": "(set|change)",
                "open": "(open|open|raise)",
                "close": "(close|close|shut|lower)",
            },
        ),
        "timers": Skill(
            (
                "HassStartTimer",
                "HassIncreaseTimer",
                "HassCancelTimer",
                "HassPauseTimer",
                "HassUnpauseTimer",
                "HassTimerStatus",
            ),
        ),
    }
)

_SPOKEN: Mapping[str, str] = {
    "the": "(the|the|the|the|my|our)",
    "in": "in",
    "all": "(all [the]|every)",
    "everywhere": (
        "(everywhere|(in|throughout) the [whole] (house|home|apartment)"
        "|in (all the rooms|every room))"
    ),
    "home": "house",
    "light": "(light|light|lights|lights|lights|lamp|lamps|lighting)",
    "turn": "(turn|turn|switch)",
    "set": "(set|set|make|change|turn)",
    "timer_set": "(start|set|set)",
    "what_is": "(what's|what is)",
    "how_is": "(how's|how is)",
}

_SHOW = r"\(music\|\[tv\] show\[s\]\|media \[player\[s\]\]\)"
_LAST = r"the \(previous\|last\) \(song\|track\)"
_EDITS: tuple[tuple[str, str], ...] = (
    (r"\(\[ \](%|°)\)", r"\1"),
    (r"\[\[ \]\(k\|kelvin\)\]", "[k| kelvin]"),
    (r"\( \|-\)", " "),
    (r"degree\[s\]", "degrees"),
    (r"\[to\] (on|off)$", r"\1"),
    (r"\[to\] (\[the\] \{brightness_level|\{color_temperature)", r"to \1"),
    (r"\[to\] \{brightness\}\[%\| percent\]", "[to] {brightness}(%| percent)"),
    (r"\{area\} \[<the>\] \{name\}", "{area} {name}"),
    (r"^\[<(set|numeric_value_set)>\](?! \[<the>\])", r"<\1>"),
    (r"\[\[the\] color of\]", "[the color of]"),
    (r"\[the\] color temperature", "the color temperature"),
    (r"\[the\] \[color\] temperature (\[of\]|of)", "the color temperature of"),
    (r"\[the\] \[current\]", "the [current]"),
    (r"\} \[current\]", "}"),
    (r"\[(in|on|by|of|<in>)\]", r"\1"),
    (r"\[on\|for\]", "on"),
    (r"\(in\|on\) (\[<the>\] \{area\})", r"in \1"),
    (r"\{area\} \[volume\]", "{area} volume"),
    (r"turn \[volume\]", "turn volume"),
    (r"\(\[<the>\] (\{\w+\});volume (up|down|\{volume_step\})\)", r"[<the>] \1 volume \2"),
    (rf"\[\[the\|my\] {_SHOW}\]", "[the|my] (music|music|[tv] show|media player)"),
    (_SHOW, "(music|music|[tv] show|media player)"),
    (r"\(\[the\] \(music\|media \[player\[s\]\]\)\)", "[the] music"),
    (r"\[track\|item\]|\(track\|item\)", "track"),
    (rf"\[(to )?{_LAST}\]", r"\1the (previous|last) (song|track)"),
    (r"\[\(song\|track\) \]\[again\]|\[\(song\|track\)\] \[again\]", "(song|track) [again]"),
    (r"\[a\|an\|the\|my\]", "a"),
    (r"and \[a\] \{timer_half", "and a {timer_half"),
    (r"\[<the>\]", "[<the>|<the>]"),
)
"""Regular expressions for parts of templates, in order, each with its more natural form."""

_SKIPPED = re.compile(r"^\[<the>\] \{name\}$|\{name\} <light>")
"""Templates that say too little ("the floor lamp") or too much ("the floor lamp lamps")."""

_SELDOM = re.compile(r"^(?:de)?activate ")
"""Templates that are drawn a third as often as others."""

_AWKWARD = re.compile(
    r"\b(?:the|my|our|every) (?:the|my|our|all|every)\b|\ball (?:all|every)\b"
    r"|\ball\b.*\b(?:light|lamp)\b|\bevery\b.*\b(?:lights|lamps|lighting)\b"
    r"|\ball\b.* is |\bevery\b.* are |^make .* to |^turn .*\bcolor\b|\d brightness"
    r"|turn (?:increase|decrease)|volume (?:increase|decrease)|^down |1/2"
    r"|^(?:open|raise|close|shut|lower) .*\bposition|fan (?:mode )?(?:on|in) (?:on|off)"
)
"""Sentences that the grammar accepts and nobody says."""

_NUMBERS: Mapping[str, Sequence[int]] = {
    "brightness": range(5, 101, 5),
    "volume": range(5, 101, 5),
    "volume_step_up": range(5, 31, 5),
    "volume_step_down": range(5, 31, 5),
    "color_temperature": range(2000, 6501, 500),
    "temperature": range(16, 27),
    "position": range(10, 100, 10),
    "timer_seconds": (5, 10, 15, 20, 30, 40, 45, 50, 90),
    "timer_minutes": (*range(1, 21), 25, 30, 35, 40, 45, 50, 55, 60, 90),
    "timer_hours": range(1, 13),
}
"""The numbers people say, by slot list; other ranges are used whole."""

_RARE = frozenset(
    {"black", "brown", "top", "middle", "focus", "diffuse", "awning", "gate", "door", "garage"}
)
"""Values of text lists that are not sampled."""

_UNIT = r"(hour|minute|second)s?\b"
_BEFORE_TIMER = re.compile(rf"(?:(?: and)? \d+ {_UNIT})* timer")


@dataclass(frozen=True)
class Block:
    """Templates of one intent that share fixed slots, domains of things, rules and lists."""

    intent: str
    slots: Mapping[str, Any]
    domains: frozenset[str]
    rules: dict[str, hassil.Sentence]
    lists: Mapping[str, hassil.SlotList]
    templates: tuple[hassil.Sentence, ...]


@lru_cache(maxsize=1)
def english() -> hassil.Intents:
    """Return Home Assistant's English without what can have no part in a reading here.

    That is: blocks that need to know where the speaker stands, templates with wildcards (a reading
    without them is preferred anyway) and templates about floors, which homes do not have.

    Raises:
        ValueError: the installed package has no English.
    """
    data = get_intents("en")
    if data is None:
        message = "home_assistant_intents has no English; reinstall home-assistant-intents"
        raise ValueError(message)
    whole = hassil.Intents.from_dict(data)
    kept = {}
    for name, intent in whole.intents.items():
        blocks = [_bounded(b, whole) for b in intent.data if set(b.requires_context) <= {"domain"}]
        kept[name] = replace(intent, data=[block for block in blocks if block.sentence_texts])
    return replace(whole, intents=kept)


def _bounded(block: IntentData, grammar: hassil.Intents) -> IntentData:
    rules = {**grammar.expansion_rules, **block.expansion_rules}
    unwanted = block.wildcard_list_names | {"floor"}
    texts = [s.text for s in block.sentences if s.text and not unwanted & set(s.list_names(rules))]
    return replace(block, sentence_texts=texts)


@lru_cache(maxsize=64)
def slot_lists(home: Home) -> dict[str, hassil.SlotList]:
    """Return the lists that a home adds to the grammar: its rooms and the names of its things."""
    names = [
        (thing, thing, {"domain": domain})
        for domain, things in home.things.items()
        for thing in things
    ]
    return {
        "area": hassil.TextSlotList.from_strings(home.areas, allow_template=False, name="area"),
        "name": hassil.TextSlotList.from_tuples(names, allow_template=False, name="name"),
    }


@lru_cache(maxsize=len(SKILLS))
def blocks_of(skill: str) -> dict[str, list[Block]]:
    """Return the blocks of each intent of a skill, narrowed to what people say.

    Raises:
        ValueError: no such skill.
    """
    if skill not in SKILLS:
        message = f"there is no skill {skill!r}; choose from {', '.join(SKILLS)}"
        raise ValueError(message)
    grammar, chosen = english(), SKILLS[skill]
    spoken = {**_SPOKEN, **chosen.spoken}
    parsed = {name: hassil.parse_sentence(text) for name, text in spoken.items()}
    blocks: dict[str, list[Block]] = {}
    for intent in chosen.intents:
        for data in grammar.intents[intent].data:
            domains = data.domains & chosen.domains
            texts = [
                text
                for text in data.sentence_texts
                for _ in range(1 if _SELDOM.search(text) else 3)
                if not _SKIPPED.search(text)
            ]
            if texts and (domains or not data.domains):
                block = Block(
                    intent=intent,
                    slots=data.slots,
                    domains=frozenset(domains or chosen.domains),
                    rules={**grammar.expansion_rules, **parsed, **data.expansion_rules},
                    lists={**grammar.slot_lists, **data.slot_lists},
                    templates=tuple(hassil.parse_sentence(_edited(text)) for text in texts),
                )
                blocks.setdefault(intent, []).append(block)
    return blocks


def _edited(template: str) -> str:
    for pattern, natural in _EDITS:
        template = re.sub(pattern, natural, template)
    return template


def draw(block: Block, home: Home, rng: random.Random) -> tuple[str, dict[str, Any]] | None:
    """Walk one template of a block: a sentence and its slots, or None when nobody says it."""
    things = [pair for d in sorted(block.domains) for pair in home.things.get(d, {}).items()]
    name, area = rng.choice(things) if things else ("", "")
    template = rng.choice(block.templates)
    lists = set(template.list_names(block.rules))
    if "area" in lists and "name" not in lists and home.areas:
        area = rng.choice(home.areas)
    bound = {"name": name, "area": area}
    if any(not bound[key] for key in lists & bound.keys()):
        return None
    walk = _Walk(block, bound, rng)
    text = _agree(" ".join(walk.text(template.expression).split()))
    return None if _AWKWARD.search(text) else (text, {**block.slots, **walk.slots})


@dataclass
class _Walk:
    """One random walk through a template, collecting the values of the lists it meets."""

    block: Block
    bound: Mapping[str, str]
    rng: random.Random
    slots: dict[str, Any] = field(default_factory=dict)

    def text(self, node: hassil.Expression) -> str:
        if isinstance(node, hassil.TextChunk):
            return node.original_text
        if isinstance(node, hassil.RuleReference):
            return self.text(self.block.rules[node.rule_name].expression)
        if isinstance(node, hassil.ListReference):
            return self._value(node)
        if not isinstance(node, hassil.Group):
            message = f"a template holds {node!r}, which is no known kind of expression"
            raise TypeError(message)
        if isinstance(node, hassil.Alternative):
            return self.text(self.rng.choice(node.items))
        items = node.items
        if isinstance(node, hassil.Permutation):
            items = self.rng.sample(items, len(items))
        return "".join(self.text(item) for item in items)

    def _value(self, node: hassil.ListReference) -> str:
        if node.list_name in self.bound:
            self.slots[node.slot_name] = self.bound[node.list_name]
            return self.bound[node.list_name]
        values = self.block.lists[node.list_name]
        if isinstance(values, hassil.RangeSlotList):
            number = self.rng.choice(_NUMBERS.get(node.list_name) or tuple(values.get_numbers()))
            self.slots[node.slot_name] = number * (values.multiplier or 1)
            return str(number)
        if not isinstance(values, hassil.TextSlotList):
            message = f"list {node.list_name!r} is neither text nor numbers; drop its templates"
            raise TypeError(message)
        value = self.rng.choice([v for v in values.values if v.value_out not in _RARE])
        self.slots[node.slot_name] = value.value_out
        return self.text(value.text_in)


def _agree(text: str) -> str:
    """Put units of time into the singular or plural, and "an" before numbers that want it."""

    def unit(match: re.Match[str]) -> str:
        single = match[1] == "1" or _BEFORE_TIMER.match(match.string, match.end())
        return f"{match[1]} {match[2]}" if single else f"{match[1]} {match[2]}s"

    text = re.sub(rf"\b(\d+) {_UNIT}", unit, text)
    text = re.sub(rf"\b(half an?) {_UNIT}", r"\1 \2", text)
    text = re.sub(rf"\b(and a half) {_UNIT}", r"\1 \2s", text)
    return re.sub(r"\ba (8|11|18|8\d)\b", r"an \1", text)
