"""Facts that only memory can answer, asked in tests as training never asks."""

from __future__ import annotations

import re

import pytest

from bench.facts import KINDS, Kind, facts


def words(template: str) -> set[str]:
    return set(re.findall(r"[a-z]+", template.replace("{x}", "").lower()))


def test_a_seed_decides_the_answers_and_nothing_else() -> None:
    assert facts(3) == facts(3)
    assert [f.answer for f in facts(3)] != [f.answer for f in facts(4)]
    assert [(f.train, f.test) for f in facts(3)] == [(f.train, f.test) for f in facts(4)]


@pytest.mark.parametrize("seed", range(20))
def test_forty_facts_have_forty_short_answers(seed: int) -> None:
    found = facts(seed)
    assert len({f.answer for f in found}) == len(found) == 40
    assert all(1 <= len(f.answer.split()) <= 6 for f in found)


def test_every_question_is_asked_once() -> None:
    asked = [question for f in facts() for question in (*f.train, *f.test)]
    assert len(set(asked)) == len(asked) == 40 * 7
    assert not any("{" in question for question in asked)


def test_no_question_gives_its_answer_away() -> None:
    for f in facts():
        assert not any(f.answer.lower() in question.lower() for question in (*f.train, *f.test))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_has_confusable_neighbours_and_a_thing_in_every_template(kind: Kind) -> None:
    assert len(set(kind.things)) == 4
    assert (len(kind.train), len(kind.test)) == (4, 3)
    assert all(template.count("{x}") == 1 for template in (*kind.train, *kind.test))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_template_of_a_test_is_among_those_of_training_nor_like_one(kind: Kind) -> None:
    training = [template for each in KINDS for template in each.train]
    for template in kind.test:
        assert template not in training
        for other in training:
            ours, theirs = words(template), words(other)
            assert len(ours & theirs) < len(ours | theirs) / 2, (template, other)
