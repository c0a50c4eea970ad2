"""``anabranch demo``: the whole loop on one machine, with the real student."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from cloud.demo import plot, report
from cloud.demo.commands import skill_schema
from cloud.demo.homes import HOMES
from cloud.demo.record import Record
from cloud.demo.story import SKILL_A, SKILL_B, Script, Story, write_scripts
from cloud.demo.town import Settings, Town, delta_bytes
from cloud.students import importer
from cloud.students import source as sources
from protos.errors import AnabranchError
from protos.harness import Harness

if TYPE_CHECKING:
    from pathlib import Path

SYSTEM = "You control a smart home. Answer with one JSON tool call."
DEMONSTRATIONS = 160
STEPS, LEARNING_RATE = 55, 1.5e-4  # fewer and longer than the default: a demo should end
_INTERRUPTED = 130  # as shells say of a command that Ctrl-C ended


@dataclass(frozen=True)
class DemoOptions:
    """What ``anabranch demo`` is told.

    ``out`` gets report, picture, logs and state; ``threads`` are each device's.
    """

    out: Path
    seed: int
    threads: int


def harness() -> Harness:
    """What the town's students are told, and how their answers must look."""
    schema: dict[str, Any] = skill_schema([SKILL_A, SKILL_B])
    return Harness(system=SYSTEM, schema=schema, max_tokens=40, memory_shown=3)


def run(options: DemoOptions) -> int:
    """Play the demo; returns the exit code: 0 when all that it promises held, but for the time."""
    console = Console()
    began = time.monotonic()
    try:
        figures = _play(options, console, began)
    except KeyboardInterrupt:
        console.print(
            f"stopped: nothing of the demo runs any more. Its logs: {options.out}/town/logs"
        )
        return _INTERRUPTED
    except ExceptionGroup as group:
        error = next(_flat(group))
        if not isinstance(error, AnabranchError):
            raise
        raise error from None
    held = report.bars(figures)
    console.print(report.table(figures, held))
    console.print(f"report  {options.out / 'report.json'}\npicture {options.out / 'accuracy.png'}")
    return 0 if all(bar.held or bar.timing for bar in held) else 1


def _flat(error: BaseException) -> Any:  # noqa: ANN401
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _flat(part)
    else:
        yield error


def _play(options: DemoOptions, console: Console, began: float) -> report.Numbers:
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("report.json", "accuracy.png", "events.jsonl"):
        (out / stale).unlink(missing_ok=True)
    shutil.rmtree(out / "town", ignore_errors=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        student = _student(out / "student", progress)
        scripts = _scripts(options.seed, progress)
        with Record(out / "events.jsonl", time.monotonic) as record:
            cloud = ("--demonstrations", str(DEMONSTRATIONS), "--steps", str(STEPS))
            rate = ("--learning-rate", str(LEARNING_RATE))
            settings = Settings(student, options.threads, (*cloud, *rate))
            town = Town(out / "town", HOMES, settings, record)
            facts = asyncio.run(_live(town, scripts, record, progress, began))
            figures = report.numbers(record, facts)
            figures["seed"] = options.seed
            figures["machine"] = _machine(options.threads)
            plot.draw(record, (SKILL_A, SKILL_B), out / "accuracy.png")
    (out / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _student(out: Path, progress: Progress) -> Path:
    task = progress.add_task("student: import", total=1.0)
    importer.bring_in(
        sources.packaged_gguf(),
        harness(),
        out,
        lambda phase, part: progress.update(task, description=f"student: {phase}", completed=part),
    )
    progress.update(task, description="student: imported", completed=1.0)
    progress.stop_task(task)
    return out


def _scripts(seed: int, progress: Progress) -> list[Script]:
    task = progress.add_task("people: what they will say", total=len(HOMES))
    scripts = write_scripts(HOMES, random.Random(seed), lambda: progress.advance(task))
    progress.stop_task(task)
    return scripts


async def _live(
    town: Town, scripts: list[Script], record: Record, progress: Progress, began: float
) -> report.Facts:
    with town.processes:
        try:
            await town.start()
            story = Story(town, scripts, record, progress)
            await story.play()
            first, second = story.versions
            old, new = await town.manifest(first), await town.manifest(second)
            results = [job.result or {} for job in story.jobs]
            used = story.jobs[-1].evidence
            return report.Facts(
                devices=[h.device for h in town.households],
                releases=(first, second),
                digests={**town.digests(), "gate": results[-1]["student"]},
                results=results,
                demonstrations_used=len(used.learn) + len(used.held_out),
                delta_bytes=delta_bytes(new, old),
                full_bytes=sum(f.size for f in new.files),
                requests=sum(h.requests for h in town.households),
                requests_failed=sum(h.failed for h in town.households),
                wall_seconds=time.monotonic() - began,
            )
        finally:
            await town.stop_clients()


def _machine(threads: int) -> dict[str, object]:
    names = ("onnxruntime", "torch", "anabranch")
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads_a_device": threads,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }
