"""What the demo's people will say."""

from __future__ import annotations

import random

import pytest

from cloud.demo.homes import HOME_A, HOME_B
from cloud.demo.story import SKILL_A, SKILL_B, TESTS, Script, gist, write_scripts


@pytest.fixture(scope="module")
def scripts() -> list[Script]:
    """Scripts of two homes."""
    return write_scripts((HOME_A, HOME_B), random.Random(3))


def said(script: Script) -> list[str]:
    """Everything of a script but its tests."""
    parts = (script.learn, script.steady, script.shift, script.after)
    return [command.text for part in parts for _, command in part]


def test_nobody_says_a_test_command_or_its_like(scripts: list[Script]) -> None:
    tests = {gist(c.text) for s in scripts for skill in (SKILL_A, SKILL_B) for c in s.tests[skill]}
    assert len(tests) == 2 * 2 * TESTS
    assert not tests & {gist(text) for s in scripts for text in said(s)}


def test_the_commands_shift_from_the_first_skill_to_the_second(scripts: list[Script]) -> None:
    for script in scripts:
        assert {skill for skill, _ in script.learn + script.steady} == {SKILL_A}
        later = [skill for skill, _ in script.shift]
        assert later.count(SKILL_B) == 9 * later.count(SKILL_A)
        assert {skill for skill, _ in script.after} == {SKILL_A, SKILL_B}
