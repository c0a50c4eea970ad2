"""The commands ``anabranch keys`` and ``anabranch release``: who signs, and signing offline."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

keys_app = typer.Typer(no_args_is_help=True, help="Keys that sign releases, and who may sign.")
release_app = typer.Typer(no_args_is_help=True, help="Releases, and signing them offline.")

State = Annotated[Path, typer.Option(help="State folder of `anabranch cloud`.", exists=True)]
_SHORT = 12


@keys_app.command("new")
def keys_new(
    file: Annotated[Path, typer.Argument(help="Where the private key goes: NAME.pem.")],
) -> None:
    """Make a key: NAME.pem, which nobody else may see, and NAME.pub for `keys change`."""
    from cloud.releases import keys  # noqa: PLC0415  # slow to import

    signer = keys.make(file)
    typer.echo(f"key     {signer.public_key.keyid}")
    typer.echo(f"private {file}")
    typer.echo(f"public  {file.with_suffix(keys.PUBLIC)}")


@keys_app.command("list")
def keys_list(state: State) -> None:
    """Who may sign what, which of these keys are on this machine, and what expires when."""
    from cloud.releases import keys, overview  # noqa: PLC0415  # slow to import

    here = keys.signers(state / "keys")
    for role in overview.roles(state):
        typer.echo(f"{role.name} {role.version}, expires {role.expires:%Y-%m-%d %H:%M} UTC")
        typer.echo(f"  {role.threshold} of {len(role.keys)} keys must sign")
        for key in role.keys:
            typer.echo(f"  {key}  {'here' if key in here else 'elsewhere'}")


@keys_app.command("change")
def keys_change(
    state: State,
    role: Annotated[
        list[str], typer.Option(help="root, targets, snapshot or timestamp; more than once.")
    ],
    add: Annotated[
        list[Path] | None, typer.Option(help="NAME.pub of a key that may sign; more than once.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(help="Id of a key that may not any more; more than once.")
    ] = None,
    threshold: Annotated[
        int | None, typer.Option(min=1, help="How many of the role's keys must sign.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="Until the new root expires.")] = 365,
) -> None:
    """Propose who may sign from now on: a new root, which the keys of this one must sign."""
    from cloud.releases import ceremony, keys, rotation  # noqa: PLC0415  # slow to import
    from cloud.releases.metadata import Lifetimes  # noqa: PLC0415  # as above

    change = rotation.Change(
        roles=role,
        add=[keys.load_public(path) for path in add or ()],
        remove=remove or (),
        threshold=threshold,
    )
    now = datetime.now(UTC).timestamp()
    rotation.propose(state, change, lifetimes=Lifetimes(root=days * 86_400.0), now=now)
    for wanting in ceremony.look(state / "tuf" / "to-sign"):
        if wanting.role == "root":
            _show(wanting.lines, wanting.missing)
    typer.echo(
        "the running cloud signs with the keys that it has; `anabranch release sign` adds others"
    )


@release_app.command("list")
def release_list(state: State) -> None:
    """The releases of a cloud, the newest first, and whether devices believe them."""
    from cloud.releases import overview  # noqa: PLC0415  # slow to import

    for release in overview.releases(state):
        made = datetime.fromtimestamp(release.created_ms / 1000, UTC)
        typer.echo(
            f"{release.channel}/{release.version}  {release.student[:_SHORT]}  "
            f"{made:%Y-%m-%d %H:%M} UTC  {release.state}"
        )


@release_app.command("sign")
def release_sign(
    folder: Annotated[
        Path, typer.Argument(help="STATE/tuf/to-sign, or a copy on the machine with the key.")
    ],
    key: Annotated[
        list[Path] | None,
        typer.Option(help="Private key to sign with; more than once. Without: only look."),
    ] = None,
) -> None:
    """Show what is to be signed, and add signatures to it. Needs no network and no cloud."""
    from cloud.releases import ceremony, keys  # noqa: PLC0415  # slow to import

    found = ceremony.look(folder)
    for wanting in found:
        _show(wanting.lines, wanting.missing)
    for path in key or ():
        signer = keys.load(path)
        for signed in ceremony.add_signature(folder, signer):
            typer.echo(
                f"signed {signed.role} with key {signer.public_key.keyid[:_SHORT]}; "
                f"{signed.missing} more wanted"
            )


def _show(lines: tuple[str, ...], missing: int) -> None:
    for line in lines:
        typer.echo(line)
    typer.echo(f"  {missing} signatures wanted")
