"""What an adaptation costs and gives, by recipe: accuracy, forgetting, bytes and seconds.

Run ``python bench/recipe.py --student build/demo/student`` (a student that ``make demo`` or
``anabranch student import`` made). Each recipe is one adaptation of the imported student as the
cloud would run it (``cloud.adapt``), on the same demonstrations of one skill; its candidate then
answers 102 unseen commands, and its delta is made as a release's would be. Results go to
``build/bench/recipe.json``, recipe by recipe, and to a table. About five minutes a recipe on
two cores.

- exact: share of the unseen commands answered to the letter, by the file that would ship;
- copies: share of 48 commands of another skill answered to the letter when that very command and
  its answer are shown, as working memory does it: what is left of learning from context;
- base KL: mean KL(base || candidate) in nats a token on the base's answers to 20 general prompts;
- delta: bytes of the delta's file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cloud import adapt
from cloud.demo.commands import Command, sample
from cloud.demo.homes import HOMES
from cloud.demo.people import exact_match
from cloud.gate.gate import GateConfig
from cloud.learners.sdft import SdftConfig
from cloud.students.importer import open_imported
from edge.delta import encode
from edge.student.runtime import Student
from protos.prompt import Message, Shown, chat

TESTS, HELD_OUT, COPIES = 102, 8, 48
SKILL, OTHER = "lights", "media"


@dataclass(frozen=True)
class Recipe:
    """What differs from the default."""

    name: str
    demonstrations: int = 119
    split_share: float = 0.5
    learning_rate: float = SdftConfig.learning_rate
    anchor_batch: int = SdftConfig.anchor_batch
    steps: int = SdftConfig.steps


RECIPES = (
    Recipe("default"),
    Recipe("no anchors", anchor_batch=0),
    Recipe("upper third only", split_share=2 / 3),
    Recipe("twice the learning rate", learning_rate=2 * SdftConfig.learning_rate),
)


def shown(command: Command) -> Shown:
    """A command as a demonstration."""
    return Shown((Message("user", command.text),), command.answer)


def copies(student: Student, commands: list[Command]) -> int:
    """How many commands a student answers to the letter when it was just shown the answer."""
    system, limit = student.harness.system, student.harness.max_tokens
    chats = [chat(system, [Message("user", c.text)], [shown(c)]) for c in commands]
    answers = student.answer_all(chats, limit)
    return sum(a.text == c.answer for a, c in zip(answers, commands, strict=True))


def measure(recipe: Recipe, student: Path, progress: Progress) -> dict[str, Any]:
    """Run one recipe; its figures."""
    imported = open_imported(student)
    commands = sample(SKILL, HOMES, TESTS + HELD_OUT + 200, random.Random(1))
    tests, held, train = commands[:TESTS], commands[TESTS : TESTS + HELD_OUT], commands[-200:]
    spec = adapt.Spec(
        masters=imported.masters.absolute(),
        learnt=None,
        base=imported.bundle.absolute(),
        current=imported.bundle.absolute(),
        train=tuple(map(shown, train[: recipe.demonstrations])),
        held_out=tuple(map(shown, held)),
        replay=(),
        earlier=(),
        split_share=recipe.split_share,
        learner=SdftConfig(
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            anchor_batch=recipe.anchor_batch,
        ),
        gate=GateConfig(),
    )
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder)
        (job / "spec.json").write_text(spec.to_json())
        task = progress.add_task(recipe.name, total=None)
        result = adapt.run(job)
        base, target = imported.bundle / "weights.bin", job / "candidate" / "weights.bin"
        delta = encode(base, target, job / "delta")
        candidate = Student.open(job / "candidate", threads=2)
        right = exact_match(candidate, tests)
        copied = copies(candidate, sample(OTHER, HOMES, COPIES, random.Random(2)))
        candidate.close()
        progress.update(task, total=1, completed=1)
    kl = next(c["value"] for c in result["checks"] if c["name"] == "base_kl")
    return {
        **asdict(recipe),
        "exact": round(right / len(tests), 4),
        "copies": round(copied / COPIES, 4),
        "base_kl": round(kl, 4),
        "delta_bytes": delta.size,
        "changed_codes": result["changed_codes"],
        "sdft_seconds": result["sdft_seconds"],
    }


def main() -> None:
    """Measure all recipes, or those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, default=Path("build/demo/student"))
    parser.add_argument("--out", type=Path, default=Path("build/bench/recipe.json"))
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(names)}; all when none is given")
    options = parser.parse_args()
    if unknown := set(options.recipes) - set(names):
        parser.error(f"no recipe {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    rows: list[dict[str, Any]] = []
    with Progress() as progress:
        for recipe in RECIPES:
            if options.recipes and recipe.name not in options.recipes:
                continue
            rows.append(measure(recipe, options.student, progress))
            machine = {"cores": os.cpu_count(), "python": platform.python_version()}
            note = {"skill": SKILL, "tests": TESTS, "machine": machine, "recipes": rows}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(note, indent=1) + "\n")
    table = Table("recipe", "exact", "copies", "base KL", "delta, MB", "SDFT, s")
    for row in rows:
        megabytes = f"{row['delta_bytes'] / 1e6:.2f}"
        seconds = f"{row['sdft_seconds']:.0f}"
        table.add_row(
            row["name"],
            f"{row['exact']:.3f}",
            f"{row['copies']:.3f}",
            f"{row['base_kl']:.3f}",
            megabytes,
            seconds,
        )
    Console().print(table)


if __name__ == "__main__":
    main()
