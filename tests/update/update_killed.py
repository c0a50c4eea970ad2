"""Kill a device with SIGKILL at every point that matters, start it again, and say what it serves.

Run by ``test_update_killed.py`` in a process of its own, which forks one child for each life of a
device. Prints one JSON object a line: scenario, point, the state in the journal at the death, and
what the next life came to.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edge.update.journal import Journal, Record
from edge.update.machine import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from protos.v1 import release_pb2
    from tests.update.update_simulator import Agent, World, raising
else:
    from update_simulator import Agent, World, raising

STATES = {
    "good": ("IDLE", "FETCHING", "VERIFYING", "APPLYING", "PROBING", "COMMITTED"),
    "bad probe": ("ROLLING_BACK", "FAILED"),
    "bad commit": ("COMMITTED", "ROLLING_BACK", "FAILED"),
    "bad rollback": ("ROLLING_BACK", "INCONSISTENT"),
}


def die() -> None:
    """What a power switch does."""
    os.kill(os.getpid(), signal.SIGKILL)


def start(world: World, scenario: str) -> Agent:
    """A life of the device, with what goes wrong in this scenario."""
    agent = world.agent()

    def remember() -> None:
        with (world.state / "wiped").open("a") as file:
            file.write("wiped\n")

    agent.hooks["wipe"] = remember
    if scenario in ("bad commit", "bad rollback"):
        agent.hooks["wipe"] = raising(RuntimeError("the memory is broken"))
    if scenario == "bad rollback":
        weights = agent.slots.folder(world.digests[0]) / "weights.bin"
        agent.hooks["swap"] = lambda: weights.write_bytes(b"gone")
    return agent


def in_child(life: Callable[[], object]) -> bytes | None:
    """Run a life in a child process; its result, or None when it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(life()).encode())
        except BaseException as error:  # noqa: BLE001 # a child must not run on as its parent
            os.write(writer, json.dumps({"error": repr(error)}).encode())
        finally:
            os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as file:
        said = file.read()
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    return said


def survive(world: World, scenario: str) -> dict[str, object]:
    """The life after: what it comes to, without and then with the cloud."""
    world.cloud.online = False
    first = world.agent()
    entry = asdict(first.client.status.serving)
    first.slots.check(first.student.digest)
    first.student.close()
    world.cloud.online = True
    agent = start(world, scenario)
    agent.update()
    if scenario == "bad rollback":
        agent.student.close()
        agent = world.agent()
        agent.update()
    state = agent.client.status.state
    wiped = (world.state / "wiped").exists()
    return {"at_once": entry, "then": asdict(agent.check()), "state": state, "wiped": wiped}


def tell(world: World, scenario: str, point: str) -> None:
    """Look at the journal of a dead device, start it again, and print what became of it."""
    state = Journal(world.state / "update" / "journal.json").read().state.name
    aside = sorted(p.name for p in world.state.rglob("*.corrupt-*"))
    said = in_child(lambda: survive(world, scenario))
    result = json.loads(said) if said is not None else {"error": "killed again"}
    if aside:
        result["error"] = f"corrupt files: {aside}"
    line = json.dumps({"scenario": scenario, "point": point, "died_in": state, **result})
    sys.stdout.write(line + "\n")
    shutil.rmtree(world.state, ignore_errors=True)


def dies_entering(world: World, scenario: str, state: State, *, times: int = 1) -> int:
    """Lives that end as soon as the journal says ``state``, until one does not; how many died."""
    write = Journal.write

    def write_and_die(journal: Journal, record: Record) -> None:
        write(journal, record)
        if record.state is state and (state is not State.IDLE or record.release):
            die()

    def life() -> None:
        setattr(Journal, "write", write_and_die)  # noqa: B010 # only this child's
        start(world, scenario).update()

    for died in range(times):
        if in_child(life) is not None:
            return died
    return times


def dies_at_step(world: World, n: int) -> bool:
    """A life that ends at its n-th durable step or received piece; False when it has fewer."""
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == n:
            die()

    def counting(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object) -> object:
            step()
            return call(*args)

        return counted

    def life() -> None:
        for name in ("fsync", "replace", "link"):
            setattr(os, name, counting(getattr(os, name)))
        world.cloud.on_read = step
        agent = start(world, "good")
        for name in ("open", "swap"):
            agent.hooks[name] = step
        agent.update()

    return in_child(life) is None


def main(root: Path) -> None:
    """Kill, restart, tell."""
    logging.disable(logging.CRITICAL)
    world = World(root)

    def refuse(manifest: release_pb2.Manifest) -> None:
        manifest.canaries[0].answer = "something else"

    for scenario, states in STATES.items():
        world.publish(1, change=refuse if scenario == "bad probe" else lambda _: None)
        for name in states:
            assert dies_entering(world, scenario, State[name]), (scenario, name)
            tell(world, scenario, f"entering {name}")
    world.publish(1)
    for name in ("PROBING", "COMMITTED"):
        dies_entering(world, "good", State[name], times=40)
        tell(world, "good", f"entering {name} again and again")
    n = 1
    while dies_at_step(world, n):
        tell(world, "good", f"step {n}")
        n += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
