"""The commands ``anabranch device``: invite devices, enrol one, list and revoke them."""

from __future__ import annotations

import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloud.identity.registry import Registry

device_app = typer.Typer(no_args_is_help=True, help="Who may connect: certificates of devices.")

State = Annotated[Path, typer.Option(help="The cloud's state folder; the cloud may be running.")]
Device = Annotated[str, typer.Argument(help="The device's name.")]
Hours = Annotated[float, typer.Option(min=0.01, help="Hours that the token is good for.")]


@contextmanager
def _registry(state: Path) -> Iterator[Registry]:
    from cloud import db  # noqa: PLC0415  # a device has no SQLAlchemy
    from cloud.identity.security import open_registry  # noqa: PLC0415  # as above

    if not state.is_dir():
        msg = f"{state} is no folder: give the --state of `anabranch cloud`"
        raise InvalidInputError(msg)
    with db.opened(state / "cloud.sqlite") as engine:
        yield open_registry(state, engine, clock=time.time)


def _tell(state: Path, token: str) -> None:
    typer.echo(f"token {token}")
    typer.echo(f"ca    {state / 'identity' / 'ca.pem'}")


@device_app.command()
def add(
    device: Device,
    state: State,
    channel: Annotated[str, typer.Option(help="The device's channel.")] = "home",
    hours: Hours = 24,
) -> None:
    """Let a device enrol: prints a one-time token, and which file the device needs beside it."""
    with _registry(state) as registry:
        registry.add(device, channel=channel)
        token = registry.invite(device, life_s=hours * 3600)
    _tell(state, token)


@device_app.command()
def token(device: Device, state: State, hours: Hours = 24) -> None:
    """Give another one-time token to a device; its old certificate ends when it is used."""
    with _registry(state) as registry:
        made = registry.invite(device, life_s=hours * 3600)
    _tell(state, made)


@device_app.command("list")
def list_devices(state: State) -> None:
    """Print every device: name, channel, state, and when its certificate or token ends."""
    with _registry(state) as registry:
        for each in registry.devices():
            ends = "-"
            if each.expires:
                ends = datetime.fromtimestamp(each.expires, UTC).isoformat(timespec="minutes")
            reason = f"\t{each.reason}" if each.reason else ""
            typer.echo(f"{each.device}\t{each.channel}\t{each.state}\t{ends}{reason}")


@device_app.command()
def revoke(
    device: Device,
    state: State,
    reason: Annotated[str, typer.Option(help="For the device and for you.")] = "no reason given",
) -> None:
    """Take back a device's certificates and tokens; a running cloud notices within seconds."""
    with _registry(state) as registry:
        ended = registry.revoke(device, reason=reason)
    typer.echo(f"{device}: {ended} certificates revoked")


@device_app.command()
def enroll(
    identity: Annotated[Path, typer.Option(help="Folder of this device's key and certificate.")],
    cloud: Annotated[str, typer.Option(help="Where the cloud enrols devices, host:port.")],
    ca: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="The cloud's identity/ca.pem.")
    ],
    token: Annotated[
        str,
        typer.Option(envvar="ANABRANCH_TOKEN", help="One-time token, of `anabranch device add`."),
    ],
    device: Annotated[
        str | None, typer.Option(help="This device's name, to be sure; the token says it, too.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Replace an identity that is there already.")
    ] = False,
) -> None:
    """Run on the device: make a key that never leaves it, and get a certificate for it."""
    from edge.identity.enroll import enroll as enrol  # noqa: PLC0415  # slow to import
    from edge.link.address import parse_address  # noqa: PLC0415  # as above

    got, channel = enrol(
        identity,
        cloud=str(parse_address(cloud)),
        token=token,
        authorities=ca.read_bytes(),
        device=device,
        again=again,
    )
    typer.echo(f"device  {got.device}")
    typer.echo(f"channel {channel}")
    typer.echo(f"until   {got.certificate.not_valid_after_utc:%Y-%m-%d}")
