"""What a student can do, and what it still is of its base, on the file that devices run."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from bench import human, retention, setup
from edge.student.runtime import Student
from protos.prompt import chat

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bench import skills
    from bench.learner import Plan
    from cloud.students.importer import Imported


def answered(student: Student, material: skills.Material) -> list[bool]:
    """Whether each unseen request is answered to the letter, greedily."""
    system, limit = student.harness.system, student.harness.max_tokens
    answers = student.answer_all([chat(system, d.messages) for d in material.tests], limit)
    return [a.text == d.answer for a, d in zip(answers, material.tests, strict=True)]


def general(
    bundle: Path,
    imported: Imported,
    plan: Plan,
    tell: Callable[[str, float], None],
    name: str = "base",
) -> dict[str, Any]:
    """What the student ``name`` still is of its base: KL, retention, and people's commands."""
    student = Student.open(bundle, threads=plan.threads)
    kl = setup.drift(imported, student, plan.threads)
    commands = [c for c in setup.people() if c.skill in plan.skills]
    right = human.exact(student, commands)
    student.close()
    kept = retention.correct(
        bundle,
        setup.DATA,
        rows=plan.rows,
        threads=plan.threads,
        report=lambda _, part: tell(f"{name}: retention", part),
    )
    return {
        "base_kl": round(kl, 5),
        "human": round(statistics.fmean(right), 4) if right else 0.0,
        "human_correct": "".join("01"[r] for r in right),
        "retention": {k: round(v, 4) for k, v in retention.shares(kept).items()},
        "retention_correct": {
            k: "".join("01"[r] for r in v) for k, v in kept.items() if k in retention.HEADLINE
        },
    }
