"""What can happen to a device during an update: together, every transition of the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.update.machine import State
from edge.update.transport import Piece
from protos.errors import StorageError, UnavailableError
from protos.v1 import fleet_pb2

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from protos.v1 import release_pb2
    from tests.update.update_simulator import Agent, Cloud, World, raising
else:
    from update_simulator import Agent, Cloud, World, raising

UNTIL_COMMIT = (State.FETCHING, State.VERIFYING, State.APPLYING, State.PROBING)


class Ledger(Cloud):
    """A cloud that writes down what it is told, so that it outlives the device's process.

    The reply to each first report is lost: the device has to tell it once more.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.on_report: Callable[[State], object] = lambda _: None

    def report(self, report: fleet_pb2.UpdateReport) -> None:
        self._reach()
        known = report.SerializeToString().hex()
        if known not in self.lines():
            with self.file.open("a") as file:
                file.write(known + "\n")
            self.on_report(State(report.state))
            message = "the reply was lost"
            raise UnavailableError(message)
        self.on_report(State(report.state))

    def lines(self) -> list[str]:
        return self.file.read_text().split() if self.file.exists() else []

    def heard(self) -> list[tuple[int, State]]:
        """Release and state of each report, as a cloud counts them: the newest sequence wins."""
        reports = [fleet_pb2.UpdateReport.FromString(bytes.fromhex(x)) for x in self.lines()]
        by_sequence = {r.sequence: r for r in reports}
        assert all(by_sequence[r.sequence] == r for r in reports), "two reports of one sequence"
        newest, counted = 0, []
        for report in reports:
            if report.sequence > newest:
                counted.append((report.release, State(report.state)))
                newest = report.sequence
        return counted


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One thing that can happen.

    Attributes:
        ends: releases that may serve in the end, whatever else happens.
        publish: what the cloud has.
        arm: what goes wrong, in each life of the device's process.
        then: the cloud's target in the lives after a fault.
        again: whether the withdrawn release is wanted again in the end.
        room: for a second student.
        unprovisioned: whether the device begins without any state.
        passes: whether nothing goes wrong any more in the lives after a fault.
    """

    ends: tuple[int, ...]
    publish: Callable[[World], object] = lambda world: world.publish(1)
    arm: Callable[[World, Agent], object] = lambda _world, _agent: None
    then: int = 1
    again: bool = False
    room: bool = True
    unprovisioned: bool = False
    passes: bool = False


def bad_bytes(pieces: list[Piece]) -> list[Piece]:
    return [Piece(p.offset, bytes(len(p.data)), p.size) for p in pieces]


def without_delta(world: World) -> None:
    del world.cloud.blobs[world.publish(1).deltas[0].sha256]


def without_file(world: World) -> None:
    files = {f.name: f.sha256 for f in world.publish(1).files}
    del world.cloud.blobs[files["harness.json"]]


def refused(world: World) -> None:
    def other(manifest: release_pb2.Manifest) -> None:
        manifest.canaries[0].answer = "something else"

    world.publish(1, change=other)


def two(world: World) -> None:
    world.publish(1)
    world.publish(2)
    world.cloud.target = 1


def alter_base(world: World, agent: Agent) -> None:
    """After the base was hashed: while the delta is fetched."""
    file = agent.slots.folder(world.digests[0]) / "weights.bin"

    def alter() -> None:
        if file.exists():
            file.write_bytes(b"altered")

    world.cloud.on_read = alter


def no_room(_: World, agent: Agent) -> None:
    setattr(agent.slots, "build", lambda *_: raising(StorageError("no room"))())  # noqa: B010


def no_memory(_: World, agent: Agent) -> None:
    agent.hooks["wipe"] = raising(RuntimeError("the memory is broken"))


def no_way_back(world: World, agent: Agent) -> None:
    no_memory(world, agent)
    weights = agent.slots.folder(world.digests[0]) / "weights.bin"

    def break_base() -> None:
        if agent.student.digest == world.digests[0]:
            weights.write_bytes(b"gone")

    agent.hooks["swap"] = break_base


def superseded_when_inconsistent(world: World, agent: Agent) -> None:
    whole = dict(agent.hooks)
    no_way_back(world, agent)

    def supersede(state: State) -> None:
        if state is State.INCONSISTENT:
            agent.hooks = whole
            world.cloud.target = 2
            agent.client.announce(2)

    _ledger(world).on_report = supersede


def announced(target: int, when: State) -> Callable[[World, Agent], None]:
    """The cloud wants something else as soon as it hears of a state."""

    def arm(world: World, agent: Agent) -> None:
        def announce(state: State) -> None:
            if state is when:
                world.cloud.target = target
                agent.client.announce(target)

        _ledger(world).on_report = announce

    return arm


def _ledger(world: World) -> Ledger:
    assert isinstance(world.cloud, Ledger)
    return world.cloud


SCENARIOS: dict[str, Scenario] = {
    "a good release": Scenario(ends=(1,)),
    "a good release, the first start": Scenario(ends=(1,), unprovisioned=True),
    "a good release, no memory for two students": Scenario(ends=(1,), room=False),
    "the same student under a new version": Scenario(
        ends=(1,), publish=lambda w: w.cloud.publish(1, w.bundles[0])
    ),
    "a student that fails its probe": Scenario(ends=(0,), publish=refused),
    "a commit that fails": Scenario(ends=(0,), arm=no_memory),
    "a commit that fails, no memory for two students": Scenario(
        ends=(0,), arm=no_memory, room=False
    ),
    "a rollback that fails": Scenario(ends=(0, 1), arm=no_way_back),
    "a newer release for an inconsistent device": Scenario(
        ends=(2,), publish=two, arm=superseded_when_inconsistent, then=2, passes=True
    ),
    "a delta that the cloud lost": Scenario(ends=(1,), publish=without_delta),
    "wrong bytes once": Scenario(ends=(1,), arm=lambda w, _: w.cloud.faults.extend([bad_bytes])),
    "wrong bytes always": Scenario(
        ends=(0,), arm=lambda w, _: w.cloud.faults.extend([bad_bytes] * 100)
    ),
    "a base that is altered after its check": Scenario(ends=(1,), arm=alter_base),
    "a file that the cloud lost": Scenario(ends=(0,), publish=without_file),
    "no room for the slot": Scenario(ends=(0,), arm=no_room),
    **{
        f"superseded while {state.name}": Scenario(
            ends=(2,), publish=two, arm=announced(2, state), then=2
        )
        for state in UNTIL_COMMIT
    },
    **{
        f"withdrawn while {state.name}": Scenario(
            ends=(0,), arm=announced(0, state), then=0, again=True
        )
        for state in UNTIL_COMMIT
    },
}
