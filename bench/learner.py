"""Skills learnt one after another, by our learner and its rivals, on the file that devices run.

Each method learns the skills in sequence from the same demonstrations, the cloud's way
(``cloud.adapt``): every stage goes on from the fp32 weights of the one before, and its codes are
written on the frozen scales. What is measured is the quantized ONNX student of each stage:

- matrix[i][j]: share of skill j's unseen requests answered to the letter after stage i (0..1);
- average: mean of the last row; bwt (backward transfer): mean of matrix[last][j] - matrix[j][j]
  over all skills but the last (Lopez-Paz and Ranzato, arXiv 1706.08840);
- base_kl: mean KL(base||student) in nats a token on the base's own answers to 20 general prompts
  that no training sees;
- retention: mean accuracy on ARC-easy, PIQA, COPA and LAMBADA (``bench/retention.py``), and
  retention_drop: how much less than the base's (0..1);
- human: share of commands that people wrote, of the skills taught, answered right.

Methods: ``sft`` is plain supervised fine-tuning of the same layers for as many steps as ours;
``sft_anchored`` the same with our anchors and replay, and our seconds at every stage (teacher's
included) or ``--rival-steps``, what the cloud does unless told otherwise; ``sdft`` our
self-distillation. ``--full`` takes five skills, three seeds, more rivals and TRL.

    make bench-learner         # three skills, one seed: 20 to 40 minutes with bfloat16
    make bench-learner-full    # hours; what is done already is not done again. One thread, and
                               # 85 steps for sft_anchored: run it twice at once on two cores

Results go to ``--out`` after every method and seed, with machine, precision and each request's
outcome. Machines with and without bfloat16 may share it: the table says what each method was in,
and where a lead is between two precisions.
Intervals are over requests, given these runs: they say nothing of how runs differ.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from bench import learner_results as results
from bench import retention, setup, skills, trl
from bench.learner_methods import FULL, QUICK, config_of
from bench.learner_report import RESULTS, summary, table
from bench.outcomes import answered, general
from cloud.lessons import REPLAY
from cloud.students.candidates import DELTA_SHARE, Work, candidates
from edge.student.runtime import Student
from protos.errors import AnabranchError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from cloud import adapt
    from cloud.learners.config import LearnerConfig
    from cloud.students.importer import Imported
    from protos.prompt import Shown

    State = dict[str, torch.Tensor]

SKILLS = ("lights", "media", skills.FACTS)
FULL_SKILLS = ("lights", "media", skills.FACTS, "climate", "timers")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    ``replay`` is how many earlier demonstrations a stage may see again. ``rival_steps`` above 0 are
    the steps of ``sft_anchored`` at every stage, in place of our seconds. With ``products`` each
    stage is written as the cloud does first; else all its codes are rounded.
    """

    methods: tuple[str, ...]
    skills: tuple[str, ...]
    seeds: tuple[int, ...]
    train: int = 120
    tests: int = 100
    replay: int = REPLAY
    rows: int = retention.ROWS
    rival_steps: int = 0
    products: bool = False
    threads: int = setup.THREADS


class Sequence:
    """One method with one seed, stage by stage."""

    def __init__(self, plan: Plan, method: str, seed: int, imported: Imported) -> None:
        self.plan, self.method, self.seed = plan, method, seed
        self.imported = imported
        self.materials = [
            skills.material(
                name, seed, train=plan.train, tests=plan.tests, exclude=setup.people_say()
            )
            for name in plan.skills
        ]
        self.result: dict[str, Any] = {"matrix": [], "stages": [], "correct": [], "seconds": 0}

    def run(
        self,
        folder: Path,
        ours: list[float] | None,
        base: LearnerConfig,
        tell: Callable[[str, float], None],
        say: Callable[[str], None],
    ) -> None:
        """Learn and measure all stages; ``ours`` are our learner's seconds at each.

        Every stage is kept in ``folder``, with what it was made of: a run that was stopped goes on
        after the last whole stage, if it is the same commit's.
        """
        made_of = self._made_of(base, ours)
        self.result |= results.whole_stages(folder, made_of)
        done = len(self.result["stages"])
        if done:
            say(f"{self.method}, seed {self.seed}: going on after {done} stages in {folder}")
        began = time.monotonic() - self.result["seconds"]
        learnt = folder / f"{done - 1}.safetensors" if done else None
        current = folder / f"{done - 1}" if done else self.imported.bundle
        for stage, material in list(enumerate(self.materials))[done:]:
            name = f"{self.method}: {material.name}"
            before, in_service = learnt, current
            if self.method == "trl":
                tell(name, 0.0)
                state, note = self._peer(stage, folder, base)
            else:
                config = config_of(
                    self.method,
                    self.seed,
                    ours[stage] if ours else None,
                    base,
                    self.plan.rival_steps,
                )
                spec = self._spec(stage, learnt, current, config)
                state, note = setup.train(spec, partial(tell, name))
            learnt, current = folder / f"{stage}.safetensors", folder / f"{stage}"
            shutil.rmtree(current, ignore_errors=True)  # of a run that was killed there
            state, written = self._write(state, before, in_service, current, stage)
            note |= written
            save_file(state, learnt)
            self.result["stages"].append(note)
            self._measure(current, stage)
            self.result["seconds"] = round(time.monotonic() - began)
            setup.write(folder / results.STAGES, {"made_of": made_of, "result": self.result})
            say(
                f"{self.method}, seed {self.seed}, {material.name}: {note['steps']} steps in "
                f"{note['learn_seconds']:.0f} s, {self.result['matrix'][-1]}"
            )
        self._finish(current, tell)
        self.result["seconds"] = round(time.monotonic() - began)

    def _made_of(self, base: LearnerConfig, ours: list[float] | None) -> dict[str, Any]:
        """What decides a run, as JSON reads it back."""
        made_of = {"method": self.method, "seed": self.seed, "commit": setup.machine()["commit"]}
        made_of |= {"student": self.imported.digest, "seconds": ours, "sdft": asdict(base)}
        plan = asdict(replace(self.plan, methods=(), seeds=()))
        read: dict[str, Any] = json.loads(json.dumps(made_of | {"plan": plan}))
        return read

    def _write(
        self, learnt: State, before: Path | None, in_service: Path, out: Path, stage: int
    ) -> tuple[State, dict[str, Any]]:
        """Write a stage's file; the parameters that it stands for, and how it would be sent."""
        work = Work(
            masters=self.imported.masters,
            before=load_file(before) if before else {},
            learnt=learnt,
            base=self.imported.bundle,
            current=in_service,
            release=stage + 1,
        )
        share = DELTA_SHARE if self.plan.products else 0
        made = next(iter(candidates(work, out, share=share)))
        return made.parameters, {
            "update": made.way,
            "noise": round(made.noise, 3),
            "changed_codes": made.changed,
            "delta_bytes": made.delta_bytes,
        }

    def _spec(
        self, stage: int, learnt: Path | None, current: Path, config: LearnerConfig
    ) -> adapt.Spec:
        return setup.spec(
            self.imported,
            self.materials[stage],
            config,
            learnt=learnt,
            current=current,
            replay=self._replay(stage),
            threads=self.plan.threads,
        )

    def _peer(self, stage: int, folder: Path, base: LearnerConfig) -> tuple[State, dict[str, Any]]:
        """A stage by TRL: the paper's recipe, but the teacher sees turns (prose it cannot read)."""
        before = self.imported.masters if not stage else folder / f"trl-{stage - 1}"
        run = trl.Run(
            model=before,
            tokenizer=self.imported.bundle / "tokenizer.json",
            system=skills.SYSTEM,
            steps=base.steps,
            batch=base.batch,
            cap=skills.harness().max_tokens,
            seed=self.seed,
            teacher="given",
            threads=self.plan.threads,
            bf16=base.precision == "bf16",
        )
        save = folder / f"trl-{stage}"
        note = trl.learn(run, self.materials[stage].train, folder, save=save)
        state = load_file(save / "model.safetensors")
        return state, {
            "steps": base.steps,
            "method": "trl",
            "precision": base.precision,
            "learn_seconds": note["train_seconds"],
            "step_seconds": note["median_step_seconds"],
            "losses": setup.tenths(note["losses"]),
        }

    def _replay(self, stage: int) -> tuple[Shown, ...]:
        earlier = [d for m in self.materials[:stage] for d in m.train]
        return tuple(earlier[:: max(1, -(-len(earlier) // self.plan.replay))])

    def _measure(self, bundle: Path, stage: int) -> None:
        student = Student.open(bundle, threads=self.plan.threads)
        row = [answered(student, material) for material in self.materials[: stage + 1]]
        student.close()
        self.result["correct"].append(["".join("01"[r] for r in right) for right in row])
        self.result["matrix"].append([round(statistics.fmean(right), 4) for right in row])

    def _finish(self, bundle: Path, tell: Callable[[str, float], None]) -> None:
        matrix = self.result["matrix"]
        self.result["average"] = round(statistics.fmean(matrix[-1]), 4)
        moves = [matrix[-1][j] - matrix[j][j] for j in range(len(matrix) - 1)]
        self.result["bwt"] = round(statistics.fmean(moves), 4) if moves else 0.0
        self.result |= general(bundle, self.imported, self.plan, tell, self.method)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="five skills, three seeds, all rivals")
    parser.add_argument("--methods", nargs="+", choices=FULL, help="these only")
    parser.add_argument("--skills", nargs="+", choices=FULL_SKILLS, help="these only, in order")
    parser.add_argument("--seeds", nargs="+", type=int, help="these only")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of sdft")
    parser.add_argument(
        "--train", type=int, default=Plan.train, help="demonstrations of a command skill"
    )
    parser.add_argument("--tests", type=int, default=Plan.tests, help="requests asked a skill")
    parser.add_argument("--rows", type=int, default=Plan.rows, help="of each retention task")
    parser.add_argument(
        "--rival-steps",
        type=int,
        default=0,
        help="steps of sft_anchored instead of our seconds: where other work shares the cores",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=Plan.threads,
        help="of this process; two of them, with a thread and some of the seeds each, get more"
        " done on two cores, and may share --out",
    )
    parser.add_argument("--products", action="store_true", help="send stages as products")
    parser.add_argument("--keep", action="store_true", help="keep weights and files of stages")
    parser.add_argument("--out", type=Path, help=f"build/bench/learner.json, or {RESULTS}")
    parser.add_argument(
        "--work", type=Path, default=Path("build/bench"), help="for the student and for weights"
    )
    options = parser.parse_args()
    plan = Plan(
        methods=tuple(options.methods or (FULL if options.full else QUICK)),
        skills=tuple(options.skills or (FULL_SKILLS if options.full else SKILLS)),
        seeds=tuple(options.seeds or ((0, 1, 2) if options.full else (0,))),
        train=options.train,
        tests=options.tests,
        rows=options.rows,
        rival_steps=options.rival_steps,
        products=options.products,
        threads=options.threads,
    )
    out: Path = options.out or (RESULTS if options.full else Path("build/bench/learner.json"))
    try:
        measure(plan, setup.options(options.set), out, options.work, keep=options.keep)
    except AnabranchError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(
            f"stopped: what was measured is in {out} and {options.work}; the same command goes on"
        )


def measure(
    plan: Plan, base_config: LearnerConfig, out: Path, work: Path, *, keep: bool = False
) -> None:
    """Run what ``out`` does not hold yet; ``keep`` the weights and files of each stage."""
    made = results.made(plan, base_config)
    results.read(out, made)
    with Progress() as progress:
        bar = progress.add_task("wait for the process that has the student", total=1.0)

        def tell(what: str, part: float) -> None:
            progress.update(bar, description=what, completed=part)

        with setup.alone(work / "learner-student"):
            imported = setup.student(skills.harness(), work / "learner-student", tell)
        with setup.alone(out):  # who comes second waits for what the first measures of the base
            kept = results.read(out, made)
            base = kept.get("base") or general(imported.bundle, imported, plan, tell)
            runs: dict[str, Any] = kept.get("runs", {})
            if runs:
                progress.console.print(setup.kept(out, runs.values()))
            setup.write(out, made | kept | {"base": base, "runs": runs})
        for wait in (False, True):  # first what no other process is at
            for seed, method in product(plan.seeds, plan.methods):
                name, folder = f"{method}/{seed}", work / "learner-work" / f"{method}-{seed}"
                if name in results.read(out, made).get("runs", {}):
                    continue
                if wait:
                    tell(f"wait for the process that has {folder}", 0.0)
                with setup.alone(folder, wait=wait) as mine:
                    runs = results.read(out, made).get("runs", {})
                    timed = method == "sft_anchored" and not plan.rival_steps
                    ours = runs.get(f"sdft/{seed}") if timed else None
                    if name in runs or not mine or (timed and not ours and not wait):
                        continue
                    sequence = Sequence(plan, method, seed, imported)
                    seconds = results.seconds(ours, plan, base_config.precision)
                    sequence.run(folder, seconds, base_config, tell, progress.console.print)
                    sequence.result |= {
                        "date": time.strftime("%Y-%m-%d"),
                        "machine": made["machine"],
                        "threads": plan.threads,
                    }
                    results.store(out, made, base, {name: sequence.result})
                    (folder / results.STAGES).unlink()
                    if not keep:
                        shutil.rmtree(folder)
    runs = results.read(out, made)["runs"]
    Console().print(table(summary(runs, base), base))


if __name__ == "__main__":
    main()
