"""What ``bench.learner`` has measured: kept stage by stage and run by run, for the next process."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from bench import setup
from bench.learner_report import changed_options, precision_of, summary
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

    from bench.learner import Plan
    from cloud.learners.config import LearnerConfig

STAGES = "stages.json"
SETTINGS = ("skills", "train", "tests", "replay", "rows", "products")
"""Of a plan, what all runs in a file of results have in common."""


def whole_stages(folder: Path, made_of: dict[str, Any]) -> dict[str, Any]:
    """The result of a run's stages in ``folder``; none, and an empty folder, if it was another."""
    try:
        kept: dict[str, Any] = json.loads((folder / STAGES).read_text())
    except (OSError, ValueError):
        kept = {}
    commit = made_of["commit"]  # with a plus it says little of what was run
    if kept.get("made_of") == made_of and commit and not commit.endswith("+"):
        return dict(kept["result"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {}


def made(plan: Plan, base: LearnerConfig) -> dict[str, Any]:
    """What all runs in a file of results were measured with.

    Not the precision: a file of many hours is made on several machines, and each stage names its
    own. The base is measured once, on the first of them.
    """
    options = {name: getattr(plan, name) for name in SETTINGS}
    sdft = asdict(base)
    del sdft["precision"]
    return {"plan": options, "sdft": sdft, "machine": setup.machine()}


def store(out: Path, made: dict[str, Any], base: dict[str, Any], run: dict[str, Any]) -> None:
    """Add a run to a file of results; all that it holds, other processes' too."""
    with setup.alone(out):
        runs: dict[str, Any] = read(out, made).get("runs", {}) | run
        rows = {"methods": summary(runs, base), "base": base, "runs": runs}
        setup.write(out, made | {"date": time.strftime("%Y-%m-%d")} | rows)


def seconds(ours: dict[str, Any] | None, plan: Plan, precision: str) -> list[float] | None:
    """What our learner took at each stage, if its run is there.

    Raises:
        InvalidInputError: it had another number of threads, or another precision.
    """
    if ours is None:
        return None
    if (other := precision_of(ours)) != precision:
        msg = (
            f"sft_anchored has the time that sdft took, measured in {other} and not "
            f"in {precision}: give it --rival-steps"
        )
        raise InvalidInputError(msg)
    if (threads := ours["threads"]) != plan.threads:
        msg = (
            f"sft_anchored has the time that sdft took, measured with --threads {threads}: "
            "take as many, or give it --rival-steps"
        )
        raise InvalidInputError(msg)
    return [stage["learn_seconds"] for stage in ours["stages"]]


def read(out: Path, made: dict[str, Any]) -> dict[str, Any]:
    """What a file of results holds, nothing if there is none.

    Raises:
        InvalidInputError: it was measured with other options.
    """
    if not out.exists():
        return {}
    kept: dict[str, Any] = json.loads(out.read_text())
    same = json.loads(json.dumps(made))
    setup.refuse_other(out, changed_options(same, kept))
    return kept
