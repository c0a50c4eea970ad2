"""People's commands become tool calls in the project's own words."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from bench.human import HumanCommand, accepted, exact, load
from cloud.demo.commands import skill_schema
from edge.student.runtime import Decoding, Student
from protos.errors import InvalidInputError
from protos.prompt import Message, chat


def test_slots_are_written_as_our_answers_are() -> None:
    raw = {
        "input": "turn up the volume to 90 on the TV",
        "output": {"name": "HassSetVolume", "arguments": {"volume_level": 90.0, "name": "TV"}},
    }
    assert accepted(raw) == {'{"name":"HassSetVolume","arguments":{"name":"tv","volume_level":90}}'}


@pytest.mark.parametrize(("text", "count"), [("next song", 2), ("next song in the living room", 1)])
def test_a_room_may_be_left_out_when_only_the_place_of_the_speaker_tells_it(
    text: str, count: int
) -> None:
    output = {"name": "HassMediaNext", "arguments": {"area": "living room"}}
    answers = accepted({"input": text, "output": output, "context": {"area": "Living Room"}})
    assert '{"name":"HassMediaNext","arguments":{"area":"living room"}}' in answers
    assert len(answers) == count


def test_a_domain_may_be_named_where_an_intent_has_no_other() -> None:
    output = {"name": "HassLightSet", "arguments": {"brightness": 50, "area": "bedroom"}}
    assert accepted({"input": "bedroom 50%", "output": output}) == {
        '{"name":"HassLightSet","arguments":{"area":"bedroom","brightness":50}}',
        '{"name":"HassLightSet","arguments":{"area":"bedroom","brightness":50,"domain":"light"}}',
    }


def rows(*calls: tuple[str, dict[str, object]]) -> str:
    lines = [
        {"input": f"command {i}", "output": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_only_what_a_skill_covers_is_kept(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "human_en.jsonl").write_text(
        rows(
            ("HassTurnOn", {"area": "kitchen", "domain": "light"}),
            ("HassTurnOn", {"domain": "light", "floor": "first floor"}),
            ("HassTurnOff", {"domain": "cover", "device_class": "garage"}),
            ("HassTurnOff", {"domain": "fan", "name": "all"}),
            ("HassPauseTimer", {"name": "pizza"}),
            ("HassPauseTimer", {"start_hours": 1}),
            ("HassGetWeather", {}),
        )
    )
    found = [(c.text, c.skill) for c in load(tmp_path)]
    assert found == [("command 0", "lights"), ("command 2", "covers"), ("command 5", "timers")]


def test_absent_data_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="Measure it yourself"):
        load(tmp_path)


def test_the_real_commands_satisfy_their_skills_schema() -> None:
    data = Path(__file__).parents[3] / "shared" / "data"
    if not (data / "home" / "human_en.jsonl").exists():
        pytest.skip("no ../shared/data")
    commands = load(data)
    assert len(commands) > 200
    for command in commands:
        schema = skill_schema([command.skill])
        assert any(
            jsonschema.Draft202012Validator(schema).is_valid(json.loads(answer))
            for answer in command.accepted
        )


def test_a_command_is_right_when_the_answer_is_one_of_the_accepted(tiny_student: Path) -> None:
    student = Student.open(tiny_student / "bundle", threads=1)
    said = student.answer(
        chat(student.harness.system, [Message("user", "lamp on")]),
        Decoding(max_tokens=student.harness.max_tokens),
    ).text
    commands = [
        HumanCommand("lamp on", "lights", frozenset({said, "other"})),
        HumanCommand("lamp on", "lights", frozenset({said + "."})),
    ]
    assert exact(student, commands) == [True, False]
    student.close()
