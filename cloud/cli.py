"""The command ``anabranch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cloud.cli_trust import keys_app, release_app
from cloud.device_cli import device_app
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
    Steps,
    Threads,
    learner_of,
)
from cloud.rollout_cli import add_device_commands, rollout_app
from cloud.student_cli import student_app
from protos.errors import AnabranchError, InvalidInputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="""Keeps small language models on IoT devices current.

Each part is a process of its own:

    anabranch broker                                   # or any MQTT 5 broker
    anabranch student import --out student
    anabranch cloud --state cloud --student student
    anabranch edge --state kitchen --device kitchen --student student/bundle
                   --trust cloud/tuf/root.json

Across a network they speak TLS (`--tls-name`, `anabranch device`).

`anabranch demo` runs them all, and a town of three homes around them.
""",
)
app.add_typer(student_app, name="student")
app.add_typer(rollout_app, name="rollout")
add_device_commands(device_app)
app.add_typer(keys_app, name="keys")
app.add_typer(release_app, name="release")
app.add_typer(device_app, name="device")

Channel = Annotated[str, typer.Option(help="The group of devices that gets the same releases.")]
Broker = Annotated[str, typer.Option(help="MQTT 5 broker, host:port.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Go without TLS across a network of yours alone.")
]


@app.command()
def broker(
    listen: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:1883",
    state: Annotated[Path, typer.Option(help="Folder for its configuration.")] = Path("broker"),
    insecure: Insecure = False,
) -> None:
    """Run the embedded MQTT 5 broker: for one machine, tests and demos. Ctrl-C stops it.

    It speaks no TLS and lets every client use every topic: a fleet takes Mosquitto.
    """
    from cloud.broker import EmbeddedBroker  # noqa: PLC0415  # a device has no broker installed
    from edge.link.address import check_plain, parse_address  # noqa: PLC0415  # as above
    from edge.process import log_to_stderr  # noqa: PLC0415  # as above

    log_to_stderr()
    if not insecure:
        check_plain(parse_address(listen).host, "a broker", instead="a fleet Mosquitto")
    EmbeddedBroker(listen=listen, workdir=state).run_forever()


@app.command()
def cloud(
    state: Annotated[Path, typer.Option(help="Folder of everything that lasts.")],
    student: Annotated[Path, typer.Option(help="Folder made by `anabranch student import`.")],
    channel: Channel = "home",
    broker: Broker = "127.0.0.1:1883",
    grpc: Annotated[str, typer.Option(help="Where devices fetch releases.")] = "127.0.0.1:50051",
    metrics: Annotated[str, typer.Option(help="Where /metrics is.")] = "127.0.0.1:9108",
    demonstrations: Annotated[
        int, typer.Option(min=10, help="Demonstrations that an adaptation needs.")
    ] = 120,
    learner: Learner = DEFAULT,
    steps: Steps = 75,
    learning_rate: LearningRate = None,
    budget: Budget = 0,
    options: Options = None,
    precision: Precision = "auto",
    min_new: MinNew = 0.5,
    max_base_kl: MaxBaseKl = 0.2,
    delta_share: DeltaShare = 1 / 60,
    plan: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="TOML file: how careful rollouts are."),
    ] = None,
    tls_name: Annotated[
        list[str] | None,
        typer.Option(help="Speak TLS: a name or address by which devices reach cloud and broker."),
    ] = None,
    enrolment: Annotated[str, typer.Option(help="Where devices enrol.")] = "127.0.0.1:50052",
    broker_folder: Annotated[
        Path | None, typer.Option(help="Folder of what Mosquitto reads: list of access, ...")
    ] = None,
    certificate_days: Annotated[
        float, typer.Option(min=0.01, help="Days that a device's certificate is good for.")
    ] = 365,
    quota_burst: Annotated[
        int, typer.Option(min=1, help="Messages of evidence that a device may give at once.")
    ] = 2000,
    quota_rate: Annotated[float, typer.Option(min=0.01, help="And a minute, on average.")] = 60,
    quota_mb: Annotated[
        float, typer.Option(min=0.1, help="MiB of evidence that a device may give a day.")
    ] = 64,
    insecure: Insecure = False,
    timestamp_hours: Annotated[
        float, typer.Option(min=0.1, help="A held back device notices after as long.")
    ] = 24,
    targets_days: Annotated[
        float, typer.Option(min=1, help="Until the list of releases must be signed again.")
    ] = 365,
    threads: Threads = 2,
) -> None:
    """Store evidence, adapt when it is worth it, release what passes the gate. Ctrl-C stops it."""
    from cloud import service  # noqa: PLC0415  # a device has no torch
    from cloud.curator import CuratorConfig  # noqa: PLC0415  # as above
    from cloud.evidence.quota import EvidenceLimits  # noqa: PLC0415  # as above
    from cloud.gate.gate import GateConfig  # noqa: PLC0415  # as above
    from cloud.identity.security import TlsConfig  # noqa: PLC0415  # as above
    from cloud.policy import PolicyConfig  # noqa: PLC0415  # as above
    from cloud.releases.metadata import Lifetimes  # noqa: PLC0415  # as above
    from cloud.rollout.plan import Plan, read_plan  # noqa: PLC0415  # as above

    curator = CuratorConfig(
        policy=PolicyConfig(demonstrations=demonstrations),
        learner=learner_of(learner, steps, learning_rate, budget, precision, options),
        gate=GateConfig(new_share=min_new, base_kl=max_base_kl, threads=threads),
        threads=threads,
        delta_share=delta_share,
    )
    service.run(
        service.CloudConfig(
            state=state,
            channel=channel,
            student=student,
            broker=broker,
            grpc=grpc,
            metrics=metrics,
            curator=curator,
            plan=read_plan(plan) if plan else Plan(),
            evidence=EvidenceLimits.of(
                burst=quota_burst, per_minute=quota_rate, mb_per_day=quota_mb
            ),
            tls=TlsConfig(
                hosts=tuple(tls_name),
                enrolment=enrolment,
                broker_folder=broker_folder,
                device_life_s=certificate_days * 86400,
            )
            if tls_name
            else None,
            insecure=insecure,
            lifetimes=Lifetimes(
                targets=targets_days * 86_400,
                snapshot=7 * timestamp_hours * 3600,
                timestamp=timestamp_hours * 3600,
            ),
        )
    )


@app.command()
def edge(
    state: Annotated[Path, typer.Option(help="Folder of everything that lasts.")],
    trust: Annotated[Path, typer.Option(help="root.json of the cloud whose releases are run.")],
    device: Annotated[
        str | None, typer.Option(help="This device's name; by default its certificate's.")
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option(help="Folder made by `anabranch device enroll`: key and certificate."),
    ] = None,
    student: Annotated[
        Path | None, typer.Option(help="Bundle of the first student; later ones come by release.")
    ] = None,
    channel: Channel = "home",
    broker: Broker = "127.0.0.1:1883",
    cloud: Annotated[str, typer.Option(help="gRPC fleet service, host:port.")] = "127.0.0.1:50051",
    listen: Annotated[str, typer.Option(help="Where the HTTP API is.")] = "127.0.0.1:8181",
    metrics: Annotated[str, typer.Option(help="Where /metrics is.")] = "127.0.0.1:9181",
    expected_corrections: Annotated[
        float,
        typer.Option(min=0.01, max=0.5, help="Share of answers people correct when all is well."),
    ] = 0.2,
    memory_limit: Annotated[
        int,
        typer.Option(
            min=0, help="MB that this process may take with two students open; 0: what there is."
        ),
    ] = 0,
    insecure: Insecure = False,
    threads: Threads = 2,
) -> None:
    """Answer people on this device, and keep its student current. Ctrl-C stops it."""
    from edge import agent  # noqa: PLC0415  # slow to import
    from edge.identity.files import load_identity  # noqa: PLC0415  # as above

    if device is None:
        if identity is None:
            msg = "who is this device? Give --device, or --identity with its certificate"
            raise InvalidInputError(msg)
        device = load_identity(identity).device
    agent.run(
        agent.AgentConfig(
            state=state,
            device=device,
            channel=channel,
            student=student,
            trust=trust,
            broker=broker,
            cloud=cloud,
            listen=listen,
            metrics=metrics,
            threads=threads,
            expected_corrections=expected_corrections,
            memory_limit=memory_limit * 1024 * 1024,
            identity=identity,
            insecure=insecure,
        )
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report, plot, logs.")] = Path("build/demo"),
    seed: Annotated[int, typer.Option(help="Of what people say.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each device.")] = 1,
) -> None:
    """Three homes drift, learn and recover, with the real student: broker, cloud, three devices."""
    from cloud.demo.run import DemoOptions, run  # noqa: PLC0415  # a device has no demo

    raise typer.Exit(run(DemoOptions(out=out, seed=seed, threads=threads)))


def main() -> None:
    """Run the command; errors that a person can act on are one line, not a traceback."""
    from edge.process import end_with_parent  # noqa: PLC0415  # slow to import

    end_with_parent()
    try:
        app()
    except AnabranchError as error:
        typer.echo(f"anabranch: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
