"""Releases of three skills one after another, sent as products and as codes, on the file of each.

Takes the stages of ``python -m bench.learner --methods sdft --keep`` (a quarter of an hour) and
learns nothing itself; some five minutes. Of each release:

- products: bytes from the release before, noise of the codes (root mean square, steps), shares of
  unseen requests of each skill so far answered to the letter, base KL in nats a token;
- codes: the same, had every code been rounded and sent after those products.

Results go to ``build/bench/chain.json``. The stages were learnt from fp32 weights, not from those
that products stand for as in the cloud: each update here also carries what the one before left out.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from bench import setup, skills
from bench.learner import SKILLS, Plan
from bench.outcomes import answered
from cloud.students.candidates import DELTA_SHARE, Candidate, Work, candidates
from edge.student.runtime import Student

if TYPE_CHECKING:
    from cloud.students.importer import Imported


def judged(
    made: Candidate, bundle: Path, taught: list[skills.Material], imported: Imported
) -> dict[str, Any]:
    """What a candidate costs and knows."""
    student = Student.open(bundle, threads=setup.THREADS)
    exact = [round(statistics.fmean(answered(student, m)), 4) for m in taught]
    kl = setup.drift(imported, student)
    student.close()
    return {
        "bytes": made.delta_bytes,
        "noise": round(made.noise, 3),
        "exact": exact,
        "base_kl": round(kl, 4),
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bench", type=Path, default=Path("build/bench"), help="of bench.learner")
    parser.add_argument("--out", type=Path, default=Path("build/bench/chain.json"))
    options = parser.parse_args()
    stages = options.bench / "learner-work" / "sdft-0"
    if not (stages / f"{len(SKILLS) - 1}.safetensors").exists():
        sys.exit(
            f"error: {stages} has no stages: run python -m bench.learner --methods sdft --keep"
        )
    imported = setup.student(skills.harness(), options.bench / "learner-student", lambda *_: None)
    taught = [
        skills.material(n, 0, train=Plan.train, tests=Plan.tests, exclude=setup.people_say())
        for n in SKILLS
    ]
    work = Work(imported.masters, {}, {}, imported.bundle, imported.bundle)
    table = Table("release", "way", "bytes", "noise", "exact", "base KL")
    releases = []
    for stage, name in enumerate(SKILLS):
        learnt = load_file(stages / f"{stage}.safetensors")
        work = replace(work, learnt=learnt, release=stage + 1)
        out = options.bench / "chain" / str(stage)
        row: dict[str, Any] = {"skill": name}
        for made in candidates(work, out, share=DELTA_SHARE):
            row[made.way] = judged(made, out, taught[: stage + 1], imported)
            table.add_row(name, made.way, *map(str, row[made.way].values()))
            if made.way == "products":
                serving = out.with_name(f"{stage}-products")
                shutil.rmtree(serving, ignore_errors=True)
                out.rename(serving)
                later = replace(work, before=made.parameters, current=serving)
        if "products" not in row:
            Console().print(table)
            sys.exit(f"{name}: every code was sent, there is no chain to go on with")
        releases.append(row)
        work = later
    setup.write(options.out, {"machine": setup.machine(), "releases": releases})
    Console().print(table)


if __name__ == "__main__":
    main()
