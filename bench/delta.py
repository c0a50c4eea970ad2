"""What an update of one skill costs to send: our deltas beside general tools and a LoRA.

A skill is learnt by the cloud's own code (``bench/setup.py``), some four minutes on two cores, and
once more as a LoRA of rank 16 in the same seconds. Of what was learnt two files are made:
``codes``, every weight rounded to the frozen scales, and ``products``, the base's codes with
low-rank products in about ``--budget`` bytes. Each tool then makes and applies its delta in a
process of its own (``bench/delta_tool.py``):

- anabranch: ours, from the base to ``products``;
- zstd_patch, bsdiff, xdelta, full_zstd: general tools on the very same pair of files (zstd at level
  19 with a window over all of it; xdelta where it is installed);
- anabranch_codes: ours without products, from the base to ``codes``;
- lora16: fp16 factors. They are judged as an adapter beside fp32 weights would answer, rounded
  once; apply_s is merging them into the device's codes.

exact_match is the share of 100 unseen commands answered to the letter, by the file that comes out.
``gain_kept`` is what ``products`` gains over the base, of what ``codes`` gain. Results go to
``--out``; the files stay in its folder, and ``--update`` uses them again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file, save_file

from bench import delta_tool, human, setup, skills
from bench.learner_methods import ANY_STEPS
from bench.outcomes import answered
from cloud.learners.config import LearnerConfig
from cloud.students import low_rank
from cloud.students.export import write_back
from edge import delta
from edge.student.bundle import sha256_file
from edge.student.runtime import Student
from protos.errors import AnabranchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud.students.importer import Imported

    State = dict[str, torch.Tensor]
    Tell = Callable[[str, float], None]

SKILL, TESTS, DEMONSTRATIONS, RANK = "lights", 100, 120, 16
BUDGET = 2_400_000
CODES, PRODUCTS, LORA = "codes", "products", "lora"
METHODS = {
    "anabranch": PRODUCTS,
    "zstd_patch": PRODUCTS,
    "bsdiff": PRODUCTS,
    "xdelta": PRODUCTS,
    "full_zstd": PRODUCTS,
    "anabranch_codes": CODES,
    "lora16": LORA,
}
"""Methods, and the file that each is judged by."""


def learn(imported: Imported, taught: skills.Material, folder: Path, tell: Tell) -> None:
    """Train the update and the LoRA into ``folder``, unless they are there."""
    config = LearnerConfig.named("sdft")
    for name in ("learnt", LORA):
        path = folder / f"{name}.safetensors"
        if path.exists():
            continue
        if name == LORA:
            seconds = json.loads((folder / "learnt.json").read_bytes())["learn_seconds"]
            config = LearnerConfig.named("lora", steps=ANY_STEPS, budget_seconds=seconds)
        spec = setup.spec(imported, taught, config)
        parameters, note = setup.train(spec, partial(tell, f"learning: {name}"))
        setup.write(folder / f"{name}.json", note | {"options": asdict(config)})
        save_file(parameters, path)


def lora_factors(masters: State, learnt: State) -> dict[str, np.ndarray[Any, Any]]:
    """The factors of merged adapters, exactly of their rank: ``up`` [m, 16], ``down`` [16, n]."""
    found = {}
    for name, value in learnt.items():
        update = value.float() - masters[name].float()
        if update.ndim == 1 or not update.any():
            continue
        left, size, right = torch.linalg.svd(update, full_matrices=False)
        root = size[:RANK].sqrt()
        found[f"{name}.up"] = (left[:, :RANK] * root).numpy()
        found[f"{name}.down"] = (root[:, None] * right[:RANK]).numpy()
    return found


def bundles(imported: Imported, folder: Path, budget: int, tell: Tell) -> None:
    """Write the bundles that are judged, and the factors that are sent."""
    masters = load_file(imported.masters / "model.safetensors")
    learnt, lora = (load_file(folder / f"{n}.safetensors") for n in ("learnt", LORA))
    tell("codes", 0.0)
    write_back(imported.bundle, learnt, skills.harness(), folder / CODES)
    tell("products", 0.0)
    updates = low_rank.products(imported.bundle, masters, learnt, budget=budget)
    low_rank.write_products(imported.bundle, updates, learnt, skills.harness(), folder / PRODUCTS)
    delta.save_updates(updates, folder / "products.npz")
    tell("factors of the LoRA", 0.0)
    factors = lora_factors(masters, lora)
    kept: dict[str, Any] = dict(factors)
    np.savez(folder / "lora.npz", **kept)
    sent = {name: torch.from_numpy(f.astype(np.float16)).float() for name, f in factors.items()}
    merged = {
        name: masters[name].float() + sent[f"{name}.up"] @ sent[f"{name}.down"]
        for name in (n.removesuffix(".up") for n in factors if n.endswith(".up"))
    }
    write_back(imported.bundle, merged, skills.harness(), folder / LORA)


def run(tool: str, action: str, *paths: Path) -> dict[str, float]:
    """One tool in a process of its own.

    Raises:
        AnabranchError: it failed.
    """
    command = [sys.executable, "-m", "bench.delta_tool", tool, action, *map(str, paths)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        msg = f"{tool} could not {action} a delta (status {done.returncode})"
        raise AnabranchError(msg)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(method: str, imported: Imported, folder: Path) -> dict[str, Any]:
    """Make and apply one method's delta."""
    if why := delta_tool.missing(method):
        return {"missing": why}
    kind = METHODS[method]
    base, target = imported.bundle / "weights.bin", folder / kind / "weights.bin"
    made, out = folder / f"{method}.delta", folder / f"{method}.out"
    factors = {"anabranch": ["products.npz"], "lora16": ["lora.npz"]}.get(method, [])
    more = [folder / name for name in factors]
    tool = "anabranch" if method == "anabranch_codes" else method
    out.unlink(missing_ok=True)
    make = run(tool, "make", base, target, made, *more)
    apply = run(tool, "apply", base, out, made, *more)
    if method != "lora16" and sha256_file(out) != sha256_file(target):
        msg = f"{method} did not give the file that its delta was made for"
        raise AnabranchError(msg)
    out.unlink()
    return {
        "bytes": made.stat().st_size,
        "make_s": round(make["seconds"], 2),
        "apply_s": round(apply["seconds"], 2),
        "make_peak_mb": round(make["peak_mb"], 1),
        "apply_peak_mb": round(apply["peak_mb"], 1),
        "peak_mb": round(max(make["peak_mb"], apply["peak_mb"]), 1),
    }


def judge(bundle: Path, taught: skills.Material) -> dict[str, float]:
    """Shares of unseen commands, and of those that people wrote, answered right."""
    student = Student.open(bundle, threads=setup.THREADS)
    written = [c for c in setup.people() if c.skill == SKILL]
    found = {
        "exact_match": round(statistics.fmean(answered(student, taught)), 4),
        "human": round(statistics.fmean(human.exact(student, written)), 4),
    }
    student.close()
    return found


def summary(methods: dict[str, dict[str, Any]], judged: dict[str, Any]) -> dict[str, Any]:
    """What the bars are about."""
    general = [m["bytes"] for n, m in methods.items() if METHODS[n] == PRODUCTS and "bytes" in m]
    ours, base = methods["anabranch"]["bytes"], judged["base"]["exact_match"]
    gains = {kind: judged[kind]["exact_match"] - base for kind in (PRODUCTS, CODES)}
    return {
        "share_of_best_general": round(ours / min(b for b in general if b != ours), 4),
        "gain_kept": round(gains[PRODUCTS] / gains[CODES], 4) if gains[CODES] else None,
    }


def main() -> None:
    """Learn (or take) an update, send it every way, judge what comes out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/delta.json"))
    parser.add_argument("--update", type=Path, help="a folder of an earlier run: nothing is learnt")
    parser.add_argument("--student", type=Path, help="where the student is imported to")
    parser.add_argument("--budget", type=int, default=BUDGET, help="bytes of the factors")
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)}; all when none given")
    options = parser.parse_args()
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}; choose from {', '.join(METHODS)}")
    folder = options.update or options.out.parent / "delta"
    folder.mkdir(parents=True, exist_ok=True)
    methods: dict[str, dict[str, Any]] = {}
    with Progress() as progress:
        bar = progress.add_task("student: import", total=1.0)

        def tell(what: str, part: float) -> None:
            progress.update(bar, description=what, completed=part)

        where = options.student or options.out.parent / "learner-student"
        imported = setup.student(skills.harness(), where, tell)
        taught = skills.material(
            SKILL, 0, train=DEMONSTRATIONS, tests=TESTS, exclude=setup.people_say()
        )
        learn(imported, taught, folder, tell)
        bundles(imported, folder, options.budget, tell)
        places = {"base": imported.bundle} | {k: folder / k for k in (CODES, PRODUCTS, LORA)}
        judged = {}
        for kind, bundle in places.items():
            tell(f"judging: {kind}", 0.0)
            judged[kind] = judge(bundle, taught)
        for method in options.methods or METHODS:
            tell(method, 0.0)
            methods[method] = measure(method, imported, folder) | judged[METHODS[method]]
            progress.console.print(f"{method}: {methods[method]}")
    note = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": setup.machine(),
        "skill": SKILL,
        "tests": TESTS,
        "demonstrations": DEMONSTRATIONS,
        "budget": options.budget,
        "learnt": {n: json.loads((folder / f"{n}.json").read_bytes()) for n in ("learnt", LORA)},
        "judged": judged,
        "methods": methods,
    }
    if "anabranch" in methods:
        note |= summary(methods, judged)
    setup.write(options.out, note)
    keys = ("bytes", "make_s", "apply_s", "peak_mb", "exact_match")
    table = Table("method", *keys)
    for name, row in methods.items():
        table.add_row(name, *(str(row.get(key, "-")) for key in keys))
    Console().print(table)


if __name__ == "__main__":
    main()
