"""The commands ``anabranch rollout``, and those of ``anabranch device`` that belong to rollouts.

They read the cloud's database and leave orders in it (:mod:`cloud.rollout.orders`), so they work
while the cloud runs, and while it does not: then it obeys when it starts.
"""

from __future__ import annotations

import getpass
import json
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

    from cloud.rollout.events import Order
    from cloud.rollout.orders import Given
    from cloud.rollout.state import Content, Device, Rollout

rollout_app = typer.Typer(
    no_args_is_help=True,
    help="""Watch rollouts, and step in.

Orders reach a running cloud within a second or two, through its database; a cloud that does not run
obeys when it starts. Each order is kept with who gave it, and what came of it.
""",
)

_WAIT_S = 15.0
_POLL_S = 0.1

State = Annotated[Path, typer.Option(help="The cloud's state folder; the cloud may be running.")]
Channel = Annotated[str, typer.Option(help="The channel.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Name = Annotated[str, typer.Argument(help="The device's name.")]
Plan = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="TOML file: how careful; default: the cloud's."),
]


@rollout_app.command("list")
def list_rollouts(state: State, *, as_json: Json = False) -> None:
    """Show each channel's newest release and how far its rollout is."""
    with _database(state) as engine:
        rows = [_summary(rollout) for _, rollout in sorted(_states(engine).items())]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    names = ("channel", "release", "phase", "wave", "committed", "failed", "devices", "reason")
    _table(names, [[row[name] for name in names] for row in rows])


@rollout_app.command()
def show(state: State, channel: Channel = "home", *, as_json: Json = False) -> None:
    """Show one rollout: its plan, every device, and the latest orders."""
    from cloud.rollout.orders import Orders  # noqa: PLC0415  # a device has no SQLAlchemy

    with _database(state) as engine:
        rollout = _rollout(engine, channel)
        orders = [_order(given) for given in Orders(engine).latest(channel, limit=10)]
    devices = [_device(d) for _, d in sorted(rollout.devices.items())]
    if as_json:
        note = _summary(rollout) | {"plan": vars(rollout.plan)}
        typer.echo(json.dumps(note | {"devices": devices, "orders": orders}, indent=1))
        return
    for name, value in _summary(rollout).items():
        typer.echo(f"{name:10} {value}")
    typer.echo("plan       " + ", ".join(f"{n} {v}" for n, v in vars(rollout.plan).items()))
    typer.echo()
    columns = ("device", "release", "health", "wave", "online", "aside", "reason")
    _table(columns, [[d[name] for name in columns] for d in devices])
    if orders:
        typer.echo()
        parts = ("order", "asked", "person", "body", "answer")
        _table(parts, [[o[name] for name in parts] for o in orders])


@rollout_app.command()
def start(
    state: State,
    release: Annotated[int, typer.Option(min=1, help="The release whose content is rolled out.")],
    channel: Channel = "home",
    plan: Plan = None,
    reason: Annotated[str, typer.Option(help="Why; kept with the order.")] = "",
) -> None:
    """Roll out a release's content anew, as a newer release, with a plan of its own if given.

    Versions only grow, and a device does not try again what failed on it: so this is also how a
    release is tried again after a halt.
    """
    from cloud.rollout.events import Bring  # noqa: PLC0415  # a device has no SQLAlchemy
    from cloud.rollout.plan import read_plan  # noqa: PLC0415  # as above

    careful = read_plan(plan) if plan else None
    with _database(state) as engine:
        content = _content(engine, channel, release)
        _give(state, engine, channel, Bring(content, gives_up=False, reason=reason, plan=careful))


@rollout_app.command()
def pause(state: State, channel: Channel = "home") -> None:
    """Tell no more devices; those that were told go on. Newer releases wait as well."""
    from cloud.rollout.events import Pause  # noqa: PLC0415  # a device has no SQLAlchemy

    with _database(state) as engine:
        _give(state, engine, channel, Pause())


@rollout_app.command()
def resume(state: State, channel: Channel = "home") -> None:
    """Go on after a pause or a halt. What failed until now counts no more; the guard is silent."""
    from cloud.rollout.events import Resume  # noqa: PLC0415  # a device has no SQLAlchemy

    with _database(state) as engine:
        _give(state, engine, channel, Resume())


@rollout_app.command()
def abort(
    state: State,
    channel: Channel = "home",
    reason: Annotated[str, typer.Option(help="Why; kept, and shown.")] = "aborted by a person",
) -> None:
    """Give the newest release up.

    If devices were told of it, a newer release brings back the content of the last good one.
    """
    from cloud.rollout.events import Abort  # noqa: PLC0415  # a device has no SQLAlchemy

    with _database(state) as engine:
        _give(state, engine, channel, Abort(reason))


@rollout_app.command()
def rollback(
    state: State,
    channel: Channel = "home",
    to: Annotated[
        int, typer.Option(min=0, help="The release to go back to; 0: the last good one.")
    ] = 0,
    plan: Plan = None,
    reason: Annotated[str, typer.Option(help="Why; kept, and shown.")] = "rolled back by a person",
) -> None:
    """Give the newest release up and bring an earlier one's content back, at any time.

    The content comes as a newer release, by a rollout of its own: versions only grow.
    """
    from cloud.rollout.events import Bring  # noqa: PLC0415  # a device has no SQLAlchemy
    from cloud.rollout.plan import read_plan  # noqa: PLC0415  # as above

    careful = read_plan(plan) if plan else None
    with _database(state) as engine:
        rollout = _rollout(engine, channel)
        if not to and rollout.stable is None:
            msg = f"channel {channel!r} had no good release before {rollout.version}: give --to"
            raise InvalidInputError(msg)
        content = _content(engine, channel, to) if to else rollout.stable
        assert content is not None  # noqa: S101  # one of the two is there
        _give(state, engine, channel, Bring(content, gives_up=True, reason=reason, plan=careful))


def add_device_commands(app: typer.Typer) -> None:
    """Add ``pin``, ``unpin`` and ``unbox`` to ``anabranch device``."""

    @app.command()
    def pin(
        device: Name,
        state: State,
        release: Annotated[
            int, typer.Option(min=0, help="The release it stays at; 0: the one that it runs.")
        ] = 0,
        channel: Channel = "home",
    ) -> None:
        """Hold a device at a release: no rollout takes it until `unpin`."""
        from cloud.rollout.events import Pin  # noqa: PLC0415  # a device has no SQLAlchemy

        with _database(state) as engine:
            known = _known(engine, channel, device)
            _give(state, engine, channel, Pin(device, release or known.release))

    @app.command()
    def unpin(device: Name, state: State, channel: Channel = "home") -> None:
        """Let a pinned device follow its channel's rollouts again."""
        from cloud.rollout.events import Unpin  # noqa: PLC0415  # a device has no SQLAlchemy

        with _database(state) as engine:
            _known(engine, channel, device)
            _give(state, engine, channel, Unpin(device))

    @app.command()
    def unbox(device: Name, state: State, channel: Channel = "home") -> None:
        """Take a device out of the penalty box, and forget its failures: it was mended."""
        from cloud.rollout.events import Unbox  # noqa: PLC0415  # a device has no SQLAlchemy

        with _database(state) as engine:
            _known(engine, channel, device)
            _give(state, engine, channel, Unbox(device))


@contextmanager
def _database(state: Path) -> Iterator[Engine]:
    from cloud import db  # noqa: PLC0415  # a device has no SQLAlchemy

    path = state / "cloud.sqlite"
    if not path.is_file():
        msg = f"{state} holds no cloud's state: give the --state of `anabranch cloud`"
        raise InvalidInputError(msg)
    with db.opened(path) as engine:
        yield engine


def _states(engine: Engine) -> dict[str, Rollout]:
    from cloud.db import create_tables  # noqa: PLC0415  # a device has no SQLAlchemy
    from cloud.rollout import driver  # noqa: PLC0415  # as above

    create_tables(engine, driver.RolloutChannelRow, driver.RolloutDeviceRow)
    return driver.load_states(engine)


def _rollout(engine: Engine, channel: str) -> Rollout:
    states = _states(engine)
    if channel not in states:
        known = ", ".join(sorted(states)) or "none yet"
        msg = f"there is no channel {channel!r} here; channels with a rollout: {known}"
        raise InvalidInputError(msg)
    return states[channel]


def _known(engine: Engine, channel: str, name: str) -> Device:
    device = _rollout(engine, channel).devices.get(name)
    if device is None:
        msg = f"channel {channel!r} knows no device {name!r}: has it ever connected?"
        raise InvalidInputError(msg)
    return device


def _content(engine: Engine, channel: str, version: int) -> Content:
    from cloud.db import create_tables, read  # noqa: PLC0415  # a device has no SQLAlchemy
    from cloud.releases.tables import ReleaseRow  # noqa: PLC0415  # as above
    from cloud.rollout.state import Content  # noqa: PLC0415  # as above

    create_tables(engine, ReleaseRow)
    with read(engine) as session:
        row = session.get(ReleaseRow, (channel, version))
        if row is None:
            msg = f"channel {channel!r} has no release {version}"
            raise InvalidInputError(msg)
        return Content(version, row.student)


def _give(state: Path, engine: Engine, channel: str, order: Order) -> None:
    """Leave an order, and wait for what comes of it if a cloud runs."""
    from cloud.rollout.orders import Orders  # noqa: PLC0415  # a device has no SQLAlchemy

    _rollout(engine, channel)
    orders = Orders(engine)
    number = orders.give(channel, order, person=getpass.getuser(), now_ms=int(time.time() * 1000))
    if not _runs(state):
        typer.echo(f"order {number} is stored: no cloud runs on {state}, it obeys when it starts")
        return
    until = time.monotonic() + _WAIT_S
    while time.monotonic() < until:
        given = orders.find(number)
        if given is not None and given.done_ms is not None:
            if given.refused:
                raise InvalidInputError(given.answer)
            typer.echo(f"order {number}: {given.answer}")
            return
        time.sleep(_POLL_S)
    typer.echo(f"order {number} is stored, and the cloud has not obeyed yet: see `rollout show`")


def _runs(state: Path) -> bool:
    """Whether a cloud holds the state folder."""
    from edge.process import locked  # noqa: PLC0415  # slow to import

    try:
        with locked(state):
            return False
    except InvalidInputError:
        return True


def _summary(rollout: Rollout) -> dict[str, Any]:
    health = [d.health for d in rollout.devices.values()]
    return {
        "channel": rollout.channel,
        "release": rollout.version,
        "phase": str(rollout.phase),
        "wave": f"{rollout.wave + 1}/{len(rollout.plan.waves)}",
        "committed": health.count("committed"),  # type: ignore[arg-type]  # it is a str
        "failed": sum(d.failed for d in rollout.devices.values()),
        "devices": len(rollout.devices),
        "good": rollout.stable.version if rollout.stable else None,
        "reason": rollout.reason,
    }


def _device(device: Device) -> dict[str, Any]:
    aside = ""
    if device.pinned is not None:
        aside = f"pinned at {device.pinned}"
    elif device.boxed_until:
        aside = f"penalty box until {_utc(device.boxed_until)}"
    return {
        "device": device.name,
        "release": device.release,
        "student": device.student,
        "health": str(device.health),
        "wave": None if device.wave is None else device.wave + 1,
        "online": device.online,
        "aside": aside,
        "strikes": device.strikes,
        "reason": device.reason,
    }


def _order(given: Given) -> dict[str, Any]:
    return {
        "order": given.number,
        "asked": _utc(given.asked_ms / 1000),
        "person": given.person,
        "body": given.body,
        "answer": given.answer or "not obeyed yet",
        "refused": given.refused,
    }


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _table(columns: tuple[str, ...], rows: list[list[Any]]) -> None:
    from rich import box  # noqa: PLC0415  # slow to import
    from rich.console import Console  # noqa: PLC0415  # as above
    from rich.table import Table  # noqa: PLC0415  # as above

    table = Table(*columns, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row), style=None)
    Console(markup=False, highlight=False).print(table)
