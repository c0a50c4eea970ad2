"""What the learner's benchmarks share: the student, one job of training, the machine."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import statistics
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import human, skills
from cloud import adapt, anchors
from cloud.gate.gate import base_kl
from cloud.learners import prompts
from cloud.learners.config import LearnerConfig, read_options
from cloud.learners.course import Control
from cloud.learners.precision import narrow
from cloud.students import importer
from cloud.students import source as sources
from edge.student.runtime import Student
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from cloud.students.importer import Imported
    from protos.harness import Harness
    from protos.prompt import Shown

THREADS = 2
DATA = Path("../shared/data")


def student(harness: Harness, out: Path, tell: Callable[[str, float], None]) -> Imported:
    """The packaged 135M student, imported once for a harness."""
    return importer.bring_in(
        sources.packaged_gguf(),
        harness,
        out.absolute(),
        lambda p, part: tell(f"student: {p}", part),
    )


@cache
def people() -> tuple[human.HumanCommand, ...]:
    """Commands that people wrote."""
    return tuple(human.load(DATA))


def people_say() -> tuple[str, ...]:
    """Their texts: no benchmark trains on them."""
    return tuple(command.text for command in people())


def spec(
    imported: Imported,
    taught: skills.Material,
    learner: LearnerConfig,
    *,
    learnt: Path | None = None,
    current: Path | None = None,
    replay: tuple[Shown, ...] = (),
    threads: int = THREADS,
) -> adapt.Spec:
    """A job that learns a skill, from the import or from what was ``learnt`` before."""
    return adapt.Spec(
        masters=imported.masters,
        learnt=learnt,
        base=imported.bundle,
        current=current or imported.bundle,
        train=taught.train,
        held_out=taught.held_out,
        replay=replay,
        earlier=(),
        learner=learner,
        threads=threads,
    )


def drift(imported: Imported, candidate: Student, threads: int = THREADS) -> float:
    """Mean KL(base||candidate) in nats a token on the base's answers to the gate's prompts."""
    said = anchors.said(imported.masters)
    base = Student.open(imported.bundle, threads=threads)
    kl = base_kl(base, candidate, [(p, said[p]) for p in prompts.GATE])
    base.close()
    return kl


def here(config: LearnerConfig) -> LearnerConfig:
    """Options with the precision that they come to on this machine: results name it."""
    bf16 = narrow(config.precision, torch.device("cpu"))
    return replace(config, precision="bf16" if bf16 else "fp32")


def train(
    spec: adapt.Spec, tell: Callable[[float], None]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One job of learning; the parameters that differ from the import, and how it went.

    It reads its anchors itself, as a cloud's first job does: no method gains by coming later.
    """
    torch.set_num_threads(spec.threads)
    losses: list[float] = []
    anchor_losses: list[float] = []

    def report(seen: Any) -> None:  # noqa: ANN401
        losses.append(seen.loss)
        anchor_losses.append(seen.anchor)
        tell(seen.fraction)

    outcome = adapt.learn(spec, Control(time.monotonic, report=report))
    worth = outcome.worth
    note = {
        "method": outcome.method,
        "precision": outcome.precision,
        "steps": outcome.steps,
        "stopped": outcome.stopped,
        "teacher": None if worth is None else str(worth),
        "learn_seconds": round(outcome.scoring_seconds + sum(outcome.step_seconds), 1),
        "scoring_seconds": round(outcome.scoring_seconds, 1),
        "step_seconds": round(statistics.median(outcome.step_seconds), 3),
        "losses": tenths(losses),
        "anchor_losses": tenths(anchor_losses),
    }
    return outcome.parameters, note


def tenths(values: Sequence[float]) -> list[float]:
    """Means of ten equal parts of a curve, or the curve if it has fewer points.

    >>> tenths([float(i // 2) for i in range(20)])
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    """
    parts = min(10, len(values))
    cuts = [len(values) * i // parts for i in range(parts + 1)] if parts else []
    return [round(statistics.fmean(values[a:b]), 4) for a, b in pairwise(cuts)]


def options(pairs: list[str]) -> LearnerConfig:
    """Our learner's options :func:`here`, with ``name=value`` changes (JSON, or plain words).

    Raises:
        InvalidInputError: no such option, or a value that it cannot take.
    """
    return here(LearnerConfig.named("sdft", **read_options(pairs)))


def machine() -> dict[str, Any]:
    """What figures were measured on."""
    return {
        "commit": _commit(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "onnxruntime": version("onnxruntime"),
    }


@cache
def _commit() -> str:
    """The commit that is measured, with a plus where code differs from it; or nothing."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def refuse_other(out: Path, changed: Sequence[str]) -> None:
    """Nothing, unless a file of results was measured with other options.

    Raises:
        InvalidInputError: ``changed`` names some.
    """
    if changed:
        msg = f"{out} was measured with other {', '.join(changed)}: name another --out, or move it"
        raise InvalidInputError(msg)


def kept(out: Path, results: Collection[dict[str, Any]]) -> str:
    """For people: how many results a benchmark goes on from, and which commits made them."""
    commits = sorted({r["machine"].get("commit", "?") for r in results})
    return f"kept: {len(results)} results in {out}, of {', '.join(commits)}"


@contextmanager
def alone(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """One process at a time with a file of results, or with a folder.

    True, or at once False where another process has it and there is no ``wait``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        mine = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        yield mine


def write(path: Path, note: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    adapt.write_atomically(path, json.dumps(note, indent=1) + "\n")
