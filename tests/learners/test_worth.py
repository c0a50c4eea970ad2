"""When a teacher is worth listening to."""

from __future__ import annotations

import torch

from cloud.learners.targets import Target
from cloud.learners.worth import Worth, measure


def says(tokens: list[int], share: float) -> Target:
    p = torch.full((len(tokens), 50), (1 - share) / 49)
    p[torch.arange(len(tokens)), torch.tensor(tokens)] = share
    return Target.of(p.log())


ANSWERS = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 10]]


def test_one_that_copies_what_it_was_shown_is() -> None:
    teacher = [says(a, 0.9) for a in ANSWERS]
    student = [says([40] * len(a), 0.5 + 0.1 * i) for i, a in enumerate(ANSWERS)]
    worth = measure(teacher, student, ANSWERS)
    assert worth.clear
    assert (worth.teacher_copies, worth.student_copies) == (1.0, 0.0)
    assert str(worth).startswith("on 4 held-out demonstrations the teacher leads by")


def test_one_that_says_what_the_student_says_is_not() -> None:
    same = [says(a, 0.9) for a in ANSWERS]
    assert not measure(same, same, ANSWERS).clear


def test_one_that_is_better_but_seldom_right_is_not() -> None:
    teacher = [says([41] * len(a), 0.3 + 0.1 * i) for i, a in enumerate(ANSWERS)]
    student = [says([42] * len(a), 0.9) for i, a in enumerate(ANSWERS)]
    worth = measure(teacher, student, ANSWERS)
    assert worth.gain > 0
    assert not worth.clear


def test_a_single_demonstration_proves_nothing() -> None:
    assert not measure([says([1], 0.9)], [says([2], 0.9)], [[1]]).clear


def test_the_lead_must_be_beyond_chance() -> None:
    assert Worth(8, 0.5, 0.2, 1.0, 0.0).clear
    assert not Worth(8, 0.5, 0.4, 1.0, 0.0).clear


def test_few_demonstrations_must_lead_by_more() -> None:
    assert Worth(40, 0.35, 0.2, 1.0, 0.0).clear
    assert not Worth(8, 0.35, 0.2, 1.0, 0.0).clear
    assert not Worth(1, 1.0, float("inf"), 1.0, 0.0).clear
