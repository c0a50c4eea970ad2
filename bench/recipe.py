"""What an adaptation costs and gives, by recipe and by what is sent: accuracy against bytes.

Each recipe is one adaptation of the imported student as the cloud would run it (``cloud.adapt``),
on the same 120 demonstrations of one skill; what it learnt is then brought to the device's codes in
one or more ways (``bench/shipping.py``), and the quantized student is measured. About five minutes
a recipe on two cores. Results go to ``build/bench/recipe.json`` recipe by recipe (the same command
goes on from there; two of them at once with ``--threads 1`` share the recipes), to a table, and to
``build/bench/recipe.png``.

- exact: share of 100 unseen commands answered to the letter, by the file that would ship;
- copies: share of 48 commands of another skill answered to the letter when that very command and
  its answer are shown, as working memory does it: what is left of learning from context;
- base KL: mean KL(base || candidate) in nats a token on the base's answers to 20 general prompts;
- bytes: of the delta as a release's would be, or of the factors that would be sent instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file

from bench import setup, shipping, skills
from bench.outcomes import answered
from cloud.learners.config import DEFAULT, LearnerConfig
from cloud.students.candidates import delta_bytes
from cloud.students.export import write_back
from edge.student.runtime import Student
from protos.errors import AnabranchError
from protos.prompt import chat

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from cloud.students.importer import Imported

    State = dict[str, torch.Tensor]

mpl.use("Agg")

TESTS, COPIES, DEMONSTRATIONS = 100, 48, 120
SKILL, OTHER = "lights", "media"
ROUND = "codes"


@dataclass(frozen=True)
class Recipe:
    """What differs from the default, and how it is shipped besides rounding."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    zones: tuple[float, ...] = ()
    budgets: tuple[float, ...] = ()


RECIPES = (
    Recipe("default", zones=(0.75,), budgets=(1.0, 1.6, 2.4)),
    Recipe("rank 16", {"rank": 16, "learning_rate": 1e-3}, budgets=(1.6,)),
    Recipe("no anchors", {"anchor_batch": 0}),
    Recipe("half the anchors", {"anchor_batch": LearnerConfig.anchor_batch // 2}),
    Recipe("half the rate", {"learning_rate": LearnerConfig.learning_rate / 2}),
    Recipe("upper third", {"layers": (2 / 3, 1.0)}),
    Recipe("upper two thirds", {"layers": (1 / 3, 1.0)}),
    Recipe("rank 32", {"rank": 32, "learning_rate": 1e-3}, budgets=(2.4,)),
)


def measure(
    recipe: Recipe, imported: Imported, threads: int, tell: Callable[[str, float], None]
) -> list[dict[str, Any]]:
    """Train one recipe; a row for each way to ship it."""
    taught = skills.material(SKILL, 0, train=DEMONSTRATIONS, tests=TESTS)
    learner = setup.here(LearnerConfig.named(DEFAULT, **recipe.changes))
    spec = setup.spec(imported, taught, learner, threads=threads)
    learnt, note = setup.train(spec, partial(tell, recipe.name))
    made_by = {
        "options": asdict(recipe),
        "training": note,
        "date": time.strftime("%Y-%m-%d"),
        "machine": setup.machine(),
        "threads": threads,
    }
    rows = []
    for way, state, size in ways(recipe, imported, learnt):
        tell(f"{recipe.name}: {way}", 1.0)
        figures = judged(imported, state, taught, size, threads)
        rows.append({"recipe": recipe.name, "shipped": way, **figures, **made_by})
    return rows


def ways(recipe: Recipe, imported: Imported, learnt: State) -> list[tuple[str, State, int | None]]:
    """Ways to ship what was learnt: name, weights, bytes (None: of the delta that they make)."""
    made: list[tuple[str, State, int | None]] = [(ROUND, learnt, None)]
    for zone in recipe.zones:
        state = shipping.rounded(imported.bundle, learnt, zone=zone)
        made.append((f"codes, dead zone {zone}", state, None))
    masters = load_file(imported.masters / "model.safetensors") if recipe.budgets else {}
    for budget in recipe.budgets:
        state, size = shipping.products(imported.bundle, masters, learnt, int(budget * 1e6))
        made.append((f"integer products in {budget} MB", state, size))
    return made


def judged(
    imported: Imported, state: State, taught: skills.Material, size: int | None, threads: int
) -> dict[str, Any]:
    """Figures of the student that a device would have."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "candidate"
        changed = write_back(imported.bundle, state, skills.harness(), bundle)
        size = delta_bytes(imported.bundle, bundle) if size is None else size
        candidate = Student.open(bundle, threads=threads)
        right = answered(candidate, taught)
        copied = copies(candidate)
        kl = setup.drift(imported, candidate, threads)
        candidate.close()
    return {
        "exact": round(statistics.fmean(right), 4),
        "copies": round(copied, 4),
        "base_kl": round(kl, 4),
        "bytes": size,
        "changed_codes": changed,
    }


def copies(student: Student) -> float:
    """Share of another skill's commands answered right when the answer was just shown."""
    asked = skills.material(OTHER, 0, train=1, tests=COPIES).tests
    chats = [chat(student.harness.system, d.messages, [d]) for d in asked]
    answers = student.answer_all(chats, student.harness.max_tokens)
    return statistics.fmean(a.text == d.answer for a, d in zip(answers, asked, strict=True))


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """The curve: accuracy against megabytes; a colour for each recipe, a marker for each way."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  # the backend is chosen first

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    kinds = {ROUND: ("o", "codes"), "integer": ("^", "integer low rank")}
    kinds |= {"codes, dead": ("s", "codes, dead zone")}
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    for number, name in enumerate(names):
        points: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for row in (row for row in rows if row["recipe"] == name):
            kind = max((k for k in kinds if row["shipped"].startswith(k)), key=len)
            points[kind].append((row["bytes"] / 1e6, row["exact"]))
        curve = sorted(points[ROUND] + points["integer"])
        axes.plot(*np.reshape(curve, (-1, 2)).T, color=f"C{number}", alpha=0.4)
        axes.plot([], [], color=f"C{number}", linewidth=5, label=name)
        for kind, (marker, _) in kinds.items():
            axes.plot(*np.reshape(points[kind], (-1, 2)).T, marker, color=f"C{number}")
    for marker, label in kinds.values():
        axes.plot([], [], marker, color="black", label=label)
    axes.set(xlabel="MB sent", ylabel="unseen commands answered to the letter", ylim=(-0.03, 1))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def run(recipes: list[Recipe], out: Path, threads: int) -> list[dict[str, Any]]:
    """Measure what ``out`` does not hold yet; all its rows.

    Recipes that another process is at come last: they are waited for.

    Raises:
        InvalidInputError: ``out`` was measured with other options.
    """
    note: dict[str, Any] = {
        "seeds": [0],
        "skill": SKILL,
        "tests": TESTS,
        "demonstrations": DEMONSTRATIONS,
        "default": asdict(setup.here(LearnerConfig.named(DEFAULT))),
    }
    rows = measured(out, note)
    with Progress() as progress:
        bar = progress.add_task("student: import", total=1.0)

        def tell(what: str, part: float) -> None:
            progress.update(bar, description=what, completed=part)

        if rows:
            progress.console.print(setup.kept(out, rows))
        tell("wait for the process that has the student", 0.0)
        with setup.alone(out.parent / "learner-student"):
            imported = setup.student(skills.harness(), out.parent / "learner-student", tell)
        for wait, recipe in product((False, True), recipes):  # first what no other process is at
            if wait:
                tell(f"wait for the process that has {recipe.name}", 0.0)
            with setup.alone(out.with_name(f"{out.name}-{recipe.name}"), wait=wait) as mine:
                there = {row["recipe"] for row in measured(out, note)}
                if not mine or recipe.name in there:
                    continue
                made = measure(recipe, imported, threads, tell)
                with setup.alone(out):
                    setup.write(out, note | {"recipes": measured(out, note) + made})
                progress.console.print(f"{recipe.name}: {made[-1]['exact']}")
    return measured(out, note)


def measured(out: Path, note: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that ``out`` holds, in the order of :data:`RECIPES`.

    Raises:
        InvalidInputError: they were measured with other options than ``note`` or ours.
    """
    kept = json.loads(out.read_text()) if out.exists() else {}
    same = json.loads(json.dumps(note))
    rows: list[dict[str, Any]] = kept.get("recipes", [])
    ours = {r.name: json.loads(json.dumps(asdict(r))) for r in RECIPES}
    changed = [n for n in same if kept and kept.get(n) != same[n]]
    changed += [row["recipe"] for row in rows if row["options"] != ours.get(row["recipe"])]
    setup.refuse_other(out, changed)
    return sorted(rows, key=lambda row: list(ours).index(row["recipe"]))


def main() -> None:
    """Measure all recipes, or those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/recipe.json"))
    parser.add_argument(
        "--threads",
        type=int,
        default=setup.THREADS,
        help="of this process; two of them, with a thread each, may share --out",
    )
    names = [recipe.name for recipe in RECIPES]
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(names)}; all when none is given")
    options = parser.parse_args()
    if unknown := set(options.recipes) - set(names):
        parser.error(f"no recipe {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    chosen = [r for r in RECIPES if r.name in (options.recipes or names)]
    try:
        rows = run(chosen, options.out, options.threads)
    except AnabranchError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped: what was measured is in {options.out}; the same command goes on")
    draw(rows, options.out.with_suffix(".png"))
    table = Table("recipe", "shipped as", "exact", "copies", "base KL", "MB")
    for row in rows:
        share = [f"{row[k]:.3f}" for k in ("exact", "copies", "base_kl")]
        table.add_row(row["recipe"], row["shipped"], *share, f"{row['bytes'] / 1e6:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
