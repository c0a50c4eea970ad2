"""Commands are drawn from Home Assistant's grammar and mean what its recogniser says."""

import json
import random
import re
from collections import Counter

import jsonschema
import pytest

from cloud.demo.commands import Command, sample, skill_schema, truth
from cloud.demo.grammar import SKILLS
from cloud.demo.homes import HOME_A, HOME_B, HOME_C, HOMES, Home

EVERYTHING = Home(
    name="all homes under one roof",
    areas=tuple(dict.fromkeys(area for home in HOMES for area in home.areas)),
    things={
        domain: {name: area for home in HOMES for name, area in home.things[domain].items()}
        for domain in HOME_A.things
    },
)


@pytest.fixture(scope="module", params=SKILLS)
def skill(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def commands(skill: str) -> list[Command]:
    return sample(skill, HOMES, 32, random.Random(0))


def folded(text: str) -> str:
    return re.sub(r"[^\w%° ]", "", text.lower())


def test_an_answer_is_what_the_recogniser_reads_in_any_home_that_has_the_words(
    commands: list[Command],
) -> None:
    for command in commands:
        readings = {truth(command.text, home) for home in HOMES} - {None}
        assert readings == {command.answer}, command
        assert truth(command.text, EVERYTHING) == command.answer, command


def test_answers_are_compact_sorted_tool_calls_that_satisfy_the_schema(
    skill: str, commands: list[Command]
) -> None:
    validator = jsonschema.Draft202012Validator(skill_schema([skill]))
    validator.check_schema(validator.schema)
    for command in commands:
        call = json.loads(command.answer)
        validator.validate(call)
        assert call["name"] == command.intent
        assert command.answer == json.dumps(
            {"name": call["name"], "arguments": dict(sorted(call["arguments"].items()))},
            separators=(",", ":"),
        )


@pytest.mark.parametrize(
    "answer",
    [
        {"name": "HassMediaPause", "arguments": {"area": "kitchen"}},
        {"name": "HassTurnOn", "arguments": {"room": "kitchen"}},
        {"name": "HassTurnOn", "arguments": {"area": "kitchen", "domain": "media_player"}},
        {"name": "HassLightSet", "arguments": {"area": "kitchen", "brightness": "50"}},
        {"name": "HassLightSet", "arguments": {"area": "kitchen", "brightness": 150}},
        {"name": "HassTurnOn", "arguments": {}, "comment": "sure"},
        {"name": "HassTurnOn"},
        "turning it on",
    ],
)
def test_the_schema_refuses_what_the_skill_cannot_do(answer: object) -> None:
    validator = jsonschema.Draft202012Validator(skill_schema(["lights", "dimming"]))
    assert not validator.is_valid(answer)


def test_a_schema_of_several_skills_accepts_the_answers_of_each() -> None:
    validator = jsonschema.Draft202012Validator(skill_schema(["lights", "media"]))
    for skill in ("lights", "media"):
        for command in sample(skill, HOME_B, 10, random.Random(2)):
            validator.validate(json.loads(command.answer))


def test_the_same_seed_gives_the_same_commands(skill: str) -> None:
    first = sample(skill, HOME_A, 15, random.Random(5))
    assert sample(skill, HOME_A, 15, random.Random(5)) == first
    assert sample(skill, HOME_A, 15, random.Random(6)) != first


def test_commands_are_distinct_and_spread_over_the_intents(
    skill: str, commands: list[Command]
) -> None:
    assert len({folded(command.text) for command in commands}) == len(commands) == 32
    counts = Counter(command.intent for command in commands)
    assert set(counts) == set(SKILLS[skill].intents)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_state_of_the_caller_decides_nothing_but_the_generator() -> None:
    rng = random.Random(1)
    one, two = sample("media", HOME_A, 10, rng), sample("media", HOME_A, 10, rng)
    assert one != two


def test_excluded_sentences_do_not_come_back_in_any_spelling() -> None:
    first = sample("media", HOME_C, 40, random.Random(3))
    exclude = [f"  {command.text.upper()}! " for command in first]
    second = sample("media", HOME_C, 40, random.Random(3), exclude)
    assert not {c.text for c in first} & {c.text for c in second}


def test_sentences_read_as_spoken(commands: list[Command]) -> None:
    for command in commands:
        assert re.fullmatch(r"[a-z0-9%°' ]+", command.text), command
        assert command.text == " ".join(command.text.split())
        assert not re.search(r"\b(the|my|our) (the|my|our)\b|\d %|\b1 \w+s\b", command.text)


def test_a_thing_is_only_looked_for_in_the_room_it_stands_in() -> None:
    for command in sample("lights", HOMES, 60, random.Random(4)):
        arguments = json.loads(command.answer)["arguments"]
        if {"name", "area"} <= set(arguments):
            assert any(
                home.things[domain].get(arguments["name"]) == arguments["area"]
                for home in HOMES
                for domain in ("light", "switch")
            )


def test_lights_and_media_suffice_for_a_demonstration() -> None:
    for skill in ("lights", "media"):
        assert len(sample(skill, HOMES, 700, random.Random(0))) == 700


def test_an_intent_that_runs_dry_leaves_its_share_to_the_others() -> None:
    silent = Home(name="silent", areas=("kitchen",), things={"media_player": {}})
    counts = Counter(c.intent for c in sample("media", silent, 60, random.Random(0)))
    assert counts.total() == 60
    assert set(SKILLS["media"].intents) - set(counts) == {
        "HassMediaPlayerMute",
        "HassMediaPlayerUnmute",
    }


def test_asking_for_more_than_the_templates_hold_says_what_to_do() -> None:
    tent = Home(name="tent", areas=(), things={})
    with pytest.raises(ValueError, match=r"only 0 of 5 media .* in home tent; ask for fewer"):
        sample("media", tent, 5, random.Random(0))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(
        ValueError, match="no skill 'gardening'; choose from lights, dimming, media"
    ):
        sample("gardening", HOMES, 1, random.Random(0))
    with pytest.raises(ValueError, match="no homes"):
        sample("lights", [], 1, random.Random(0))
    with pytest.raises(ValueError, match="has no 'attic' for 'floor lamp'; add the area"):
        Home(name="flat", areas=("kitchen",), things={"light": {"floor lamp": "attic"}})


@pytest.mark.parametrize("text", ["turn on the lights", "turn on the moon", "", "buy milk"])
def test_a_sentence_that_does_not_stand_by_itself_has_no_truth(text: str) -> None:
    assert truth(text, HOME_A) is None
