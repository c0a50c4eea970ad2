"""What a step of learning costs: ours, supervised fine-tuning, and TRL's ``SDFTTrainer``.

Twenty steps each, one method after another in processes of their own (so that peak memory is each
method's), on the same home commands, eight a step, with no anchors and no replay; products in
bfloat16, TRL's too, where the processor multiplies it by itself (``bf16`` in the results):

- sdft: our self-distillation;
- sft: cross-entropy on the same batches and layers;
- sdft_fp32, sft_fp32, trl_fp32: the same in fp32;
- sdft_with_anchors: sdft with its anchors; sft_with_anchors: the default learner with its own;
- sdft_paper: the paper's recipe by our code (all layers and embeddings, averaged teacher, sampled
  answers of at most 40 tokens, full vocabulary);
- trl: the paper's recipe by TRL, in an environment of its own (``bench/peers/trl_sdft.py``).

The step_seconds of ours are the median step and, on top, its share of what was scored before the
first step (the teacher's word on every lesson, the base's on the anchors), shared by the default
number of steps; step_alone_seconds are without. TRL scores nothing beforehand.

``make bench-learner-speed`` makes TRL's environment first. Results go to
``build/bench/learner_speed.json``. Some fifteen minutes on two idle cores; other work beside it
makes the figures worthless.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import setup, skills, trl
from cloud import adapt
from cloud.learners.config import LearnerConfig
from cloud.students.importer import open_imported
from protos.errors import AnabranchError

if TYPE_CHECKING:
    from cloud.students.importer import Imported

STEPS, BATCH, CAP, LESSONS = 20, 8, 40, 120
ALONE: dict[str, Any] = {"anchor_batch": 0, "replay_batch": 0}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", ALONE),
    "sdft": ("sdft", ALONE),
    "sft_fp32": ("sft", ALONE | {"precision": "fp32"}),
    "sdft_fp32": ("sdft", ALONE | {"precision": "fp32"}),
    "sdft_with_anchors": ("sdft", {}),
    "sft_with_anchors": ("sft-anchored", {}),
    "sdft_paper": ("sdft-paper", {"cap": CAP}),
}
PEERS = ("trl", "trl_fp32")


def spec(method: str, imported: Imported) -> adapt.Spec:
    """The job that is timed."""
    name, changes = OURS[method]
    config = setup.here(LearnerConfig.named(name, steps=STEPS, batch=BATCH, **changes))
    taught = skills.material("lights", 0, train=LESSONS, tests=1)
    return setup.spec(imported, taught, config)


def ours(method: str, student: Path) -> dict[str, Any]:
    """Time one of our methods in this process."""
    job = spec(method, open_imported(student))
    _, note = setup.train(job, lambda _: None)
    shared = note["scoring_seconds"] / LearnerConfig().steps
    return {
        "step_seconds": round(note["step_seconds"] + shared, 3),
        "step_alone_seconds": note["step_seconds"],
        "scoring_seconds": note["scoring_seconds"],
        "peak_mb": adapt.peak_mb(),
        "config": asdict(job.learner),
    }


def peer(student: Path, folder: Path, *, bf16: bool) -> dict[str, Any]:
    """Time TRL.

    Raises:
        AnabranchError: it is not there, or it failed.
    """
    imported = open_imported(student)
    run = trl.Run(
        model=imported.masters,
        tokenizer=imported.bundle / "tokenizer.json",
        system=skills.SYSTEM,
        steps=STEPS,
        batch=BATCH,
        cap=CAP,
        bf16=bf16,
    )
    note = trl.learn(run, skills.material("lights", 0, train=LESSONS, tests=1).train, folder)
    return {
        "step_seconds": note["median_step_seconds"],
        "rollout_seconds": round(statistics.median(note["rollout_seconds"]), 3),
        "peak_mb": note["peak_mb"],
        "completion_tokens": note["completion_tokens"],
        "config": note["config"],
        "versions": note["versions"],
    }


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """All methods, one after another; the table is printed at the end."""
    bar = progress.add_task("student: import", total=1.0)
    folder = options.out.parent
    student = folder / "learner-student"
    setup.student(
        skills.harness(),
        student,
        lambda p, part: progress.update(bar, description=p, completed=part),
    )
    methods: dict[str, Any] = {}
    bf16 = setup.here(LearnerConfig()).precision == "bf16"
    for number, method in enumerate((*OURS, *PEERS)):
        share = number / len((*OURS, *PEERS))
        progress.update(bar, description=f"{method}: {STEPS} steps", completed=share)
        if method in PEERS:
            methods[method] = peer(student, folder, bf16=bf16 and method == "trl")
            continue
        ended = subprocess.run(
            [sys.executable, "-m", "bench.learner_speed", "--one", method, "--out", options.out],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if ended.returncode:
            msg = f"{method} ended with {ended.returncode}: its error stands above"
            raise AnabranchError(msg)
        methods[method] = json.loads(ended.stdout)
        progress.console.print(f"{method}: {methods[method]['step_seconds']} s a step")
    progress.update(bar, completed=1.0)
    note = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": setup.machine(),
        "bf16": bf16,
        "steps": STEPS,
        "batch": BATCH,
        "seeds": [0],
        "ratios": {
            "sdft_to_sft": _ratio(methods, "sdft", "sft"),
            "trl_to_sdft": _ratio(methods, "trl", "sdft"),
            "trl_to_sdft_paper": _ratio(methods, "trl", "sdft_paper"),
            "fp32_to_sdft": _ratio(methods, "sdft_fp32", "sdft"),
        },
        "methods": methods,
    }
    setup.write(options.out, note)
    return note


def _ratio(methods: dict[str, Any], one: str, other: str) -> float:
    return round(float(methods[one]["step_seconds"] / methods[other]["step_seconds"]), 2)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/learner_speed.json"))
    parser.add_argument("--one", choices=OURS, help="time one of ours here, and print JSON")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.one:
        print(json.dumps(ours(options.one, options.out.parent / "learner-student")))
        return
    if not trl.PYTHON.exists():
        parser.error(f"{trl.PYTHON} is missing: `make bench-learner-speed` makes it")
    try:
        with Progress() as progress:
            note = measure(options, progress)
    except AnabranchError as error:
        sys.exit(f"error: {error}")
    table = Table("method", "s a step", "peak MB")
    for name, figures in note["methods"].items():
        table.add_row(name, f"{figures['step_seconds']:.2f}", f"{figures['peak_mb']:.0f}")
    Console().print(table, note["ratios"])


if __name__ == "__main__":
    main()
