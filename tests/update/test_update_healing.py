"""Disks that change what they hold, blocks that cannot be read: a device heals by fetching."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edge.delta.files import KEPT_ASIDE
from edge.update.journal import Journal
from edge.update.machine import Action, State
from edge.update.slots import Entry
from protos.errors import (
    IntegrityError,
    InvalidInputError,
    StorageError,
    UnavailableError,
)

if TYPE_CHECKING:
    from edge.update.client import UpdateClient
    from tests.update.update_simulator import WEIGHTS, Agent, World
else:
    from update_simulator import WEIGHTS, World

UNREADABLE = Path("/proc/self/mem")  # its first byte cannot be read: EIO


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def make_unreadable(file: Path) -> None:
    """What a bad block does to who reads it."""
    file.unlink()
    file.symlink_to(UNREADABLE)
    with pytest.raises(OSError, match="Input/output error"):
        file.read_bytes()


def stop_entering(agent: Agent, monkeypatch: pytest.MonkeyPatch, state: State) -> None:
    """Let the process end as soon as the journal says ``state``."""
    write = Journal.write

    def write_and_stop(journal: Journal, record: object) -> None:
        write(journal, record)  # type: ignore[arg-type]
        if getattr(record, "state", None) is state:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            agent.update()


@pytest.mark.parametrize("name", ["weights.bin", "graph.onnx"])
def test_a_base_with_a_bad_block_is_not_built_on(world: World, name: str) -> None:
    world.publish(1)
    agent = world.agent()
    make_unreadable(agent.slots.folder(world.digests[0]) / name)
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)


def test_a_slot_with_a_bad_block_is_made_anew(world: World) -> None:
    agent = world.agent()
    for n in (1, 2):
        world.publish(n)
        agent.update()
    make_unreadable(agent.slots.folder(world.digests[1]) / "weights.bin")
    world.cloud.publish(3, world.bundles[1])
    agent.update()
    assert agent.check() == Entry(world.digests[1], 3)


def test_a_student_that_was_altered_in_service_is_fetched_again(world: World) -> None:
    for n in (1, 2):
        world.publish(n)
        world.agent().update()
    weights = world.state / "slots" / world.digests[2] / "weights.bin"
    weights.write_bytes(bytes(WEIGHTS))
    reborn = world.agent()
    assert reborn.client.status.serving == Entry(world.digests[1], 1)
    reborn.update()
    assert reborn.check() == Entry(world.digests[2], 2)
    assert world.cloud.told[-1] == "committed"


@pytest.mark.parametrize("damage", ["slot", "manifest"])
@pytest.mark.parametrize("state", [State.PROBING, State.COMMITTED])
def test_what_was_altered_before_it_served_is_fetched_again(
    world: World, monkeypatch: pytest.MonkeyPatch, state: State, damage: str
) -> None:
    world.publish(1)
    stop_entering(world.agent(), monkeypatch, state)
    if damage == "slot":
        make_unreadable(world.state / "slots" / world.digests[1] / "weights.bin")
    else:
        (world.state / "update" / "manifest").write_bytes(b"altered")
    reborn = world.agent()
    reborn.update()
    assert reborn.check() == Entry(world.digests[1], 1)
    assert "failed" not in world.cloud.told


def start_on_the_one_before(world: World, monkeypatch: pytest.MonkeyPatch) -> Agent:
    """A device whose base is damaged while it is switched off in the middle of an update."""
    agent = world.agent()
    world.publish(1)
    agent.update()
    world.publish(2)
    stop_entering(agent, monkeypatch, State.FETCHING)
    (world.state / "slots" / world.digests[1] / "weights.bin").write_bytes(bytes(WEIGHTS))
    reborn = world.agent()
    assert reborn.client.status.serving == Entry(world.digests[0], 0)
    return reborn


def test_a_damaged_base_does_not_become_the_one_to_fall_back_to(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = start_on_the_one_before(world, monkeypatch)
    agent.update()
    assert agent.check() == Entry(world.digests[2], 2)
    assert agent.slots.pointer().previous == Entry(world.digests[0], 0)


def test_a_rollback_does_not_leave_a_good_student_for_a_damaged_base(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = start_on_the_one_before(world, monkeypatch)
    world.publish(2, change=lambda m: setattr(m.bounds, "max_seconds", 0.5))
    agent.update()
    assert agent.check() == Entry(world.digests[0], 0)
    assert world.cloud.told[-1] == "failed"


def test_without_room_for_two_another_student_serves_when_the_old_one_was_damaged(
    world: World,
) -> None:
    world.publish(1)
    world.agent().update()
    world.publish(2, change=lambda m: setattr(m.bounds, "max_seconds", 0.5))
    agent = world.agent()
    agent.room = False
    weights = agent.slots.folder(world.digests[1]) / "weights.bin"
    agent.hooks["unload"] = lambda: weights.write_bytes(bytes(WEIGHTS))
    agent.update()
    assert agent.student.digest == world.digests[0]
    assert not agent.student.closed
    assert agent.client.status.serving == Entry(world.digests[0], 0)
    assert world.cloud.told[-1] == "inconsistent"
    reborn = world.agent()
    reborn.update()
    assert reborn.check() == Entry(world.digests[0], 0)
    assert reborn.client.status.state == "idle"


@pytest.mark.parametrize("name", ["update/journal.json", "slots/pointer.json"])
def test_a_journal_or_pointer_that_cannot_be_read_keeps_no_device_from_serving(
    world: World, name: str
) -> None:
    world.publish(1)
    world.agent().update()
    make_unreadable(world.state / name)
    reborn = world.agent()
    assert reborn.student.digest in world.digests[:2]
    reborn.update()
    assert reborn.check() == Entry(world.digests[1], 1)
    assert (world.state / f"{name}.corrupt-1").is_symlink()


def test_corrupt_copies_do_not_fill_the_disk(world: World) -> None:
    journal = world.state / "update" / "journal.json"
    for n in range(3 * KEPT_ASIDE):
        world.agent()
        journal.write_text(f"corrupt {n}")
        Journal(journal).read()
    kept = {p.name: p.read_text() for p in journal.parent.glob("*.corrupt-*")}
    latest = range(2 * KEPT_ASIDE, 3 * KEPT_ASIDE)
    assert kept == {f"journal.json.corrupt-{n + 1}": f"corrupt {n}" for n in latest}


def test_releases_that_supersede_one_another_leave_no_slots_behind(world: World) -> None:
    for n in (1, 2, 3):
        world.publish(n)
    agent = world.agent()
    world.cloud.target = 1
    most = 0

    def supersede() -> None:
        nonlocal most
        most = max(most, sum(p.is_dir() for p in (world.state / "slots").iterdir()))
        if world.cloud.target < 3:
            world.cloud.target += 1
            agent.client.announce(world.cloud.target)

    agent.hooks["open"] = supersede
    agent.update()
    assert agent.check() == Entry(world.digests[3], 3)
    assert most == 2


WORK = (
    Action.FETCH,
    Action.VERIFY,
    Action.APPLY,
    Action.PROBE,
    Action.COMMIT,
)
ERRORS = [
    UnavailableError("away"),
    StorageError("full"),
    IntegrityError("wrong"),
    InvalidInputError("refused"),
    RuntimeError("broken"),
]


def failing(client: UpdateClient[object], action: Action, error: Exception, times: int) -> None:
    """Let an action fail so often before it works."""
    work, left = client._do[action], iter(range(times))

    def fail(record: object) -> object:
        for _ in left:
            raise error
        return work(record)  # type: ignore[arg-type]

    client._do[action] = fail  # type: ignore[assignment]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("action", WORK)
@pytest.mark.parametrize("times", [1, 1000])
def test_whatever_fails_in_a_state_a_device_serves_and_takes_the_next_release(
    world: World, action: Action, error: Exception, times: int
) -> None:
    world.publish(1)
    agent = world.agent()
    failing(agent.client, action, error, times)  # type: ignore[arg-type]
    agent.update()
    for_ever = times > 1 and not isinstance(error, UnavailableError)
    heals = (UnavailableError, StorageError)
    if action in (Action.FETCH, Action.VERIFY, Action.APPLY):
        heals += (IntegrityError, InvalidInputError)
    release = 1 if isinstance(error, heals) and not for_ever else 0
    assert agent.check() == Entry(world.digests[release], release)
    assert world.cloud.told[-1] == ("committed" if release else "failed")
    world.publish(2)
    reborn = world.agent()
    reborn.update()
    assert reborn.check() == Entry(world.digests[2], 2)


def test_every_state_with_work_was_made_to_fail() -> None:
    """Except RESTORE (``test_update_client.py``), and CLEAN, which may fail."""
    other = {Action.BEGIN, Action.REMEMBER, Action.RESTORE, Action.CLEAN}
    assert set(Action) - other == set(WORK)
