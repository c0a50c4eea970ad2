"""Lines that are cut, bytes that are wrong, disks that are full."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edge.update.decide import MAX_DISK_TRIES, MAX_STRIKES
from edge.update.slots import Entry
from edge.update.transport import Piece

if TYPE_CHECKING:
    from collections.abc import Callable

    from protos.v1 import release_pb2
    from tests.update.update_simulator import WEIGHTS, World
else:
    from update_simulator import WEIGHTS, World

FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_cut_line_goes_on_where_it_was_cut(world: World) -> None:
    manifest = world.publish(1, change=lambda m: m.ClearField("deltas"))
    cuts = [1, 399, 400, 401, 1000, 0, 7]
    world.cloud.faults.extend(cuts)
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)
    weights = {f.name: f.sha256 for f in manifest.files}["weights.bin"]
    offsets = [offset for sha, offset in world.cloud.reads if sha == weights]
    assert offsets == [sum(cuts[:n]) for n in range(len(cuts) + 1)]
    assert agent.metric("anabranch_update_fetched_bytes_total", kind="file") == sum(
        f.size for f in manifest.files if f.name in ("weights.bin", "harness.json")
    )


def test_short_answers_are_asked_on(world: World) -> None:
    world.publish(1)
    agent = world.agent()
    world.cloud.faults.extend([lambda pieces: pieces[:1], lambda _: []])
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)


def bad_bytes(pieces: list[Piece]) -> list[Piece]:
    return [Piece(p.offset, bytes(len(p.data)), p.size) for p in pieces]


def endless(pieces: list[Piece]) -> list[Piece]:
    size = pieces[0].size
    return [Piece(n * 500, bytes(500), size) for n in range(1_000_000 // 500)]


def other_size(pieces: list[Piece]) -> list[Piece]:
    return [Piece(p.offset, p.data, 1 << 40) for p in pieces]


def elsewhere(pieces: list[Piece]) -> list[Piece]:
    return [Piece(p.offset + 1, p.data, p.size) for p in pieces]


FAULTS = [bad_bytes, endless, other_size, elsewhere]


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_bytes_are_thrown_away_and_fetched_again(
    world: World, fault: Callable[[list[Piece]], list[Piece]]
) -> None:
    world.publish(1)
    world.cloud.faults.append(fault)
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)
    assert "failed" not in world.cloud.told


@pytest.mark.parametrize("fault", FAULTS)
def test_bytes_that_are_always_wrong_end_in_failure(
    world: World, fault: Callable[[list[Piece]], list[Piece]]
) -> None:
    world.publish(1)
    world.cloud.faults.extend([fault] * 100)
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[0], 0)
    assert world.cloud.told[-1] == "failed"
    assert 100 - len(world.cloud.faults) <= 4 * MAX_STRIKES
    assert agent.metric("anabranch_updates_total", result="failed") == 1
    assert not (world.state / "downloads").exists()


def test_a_delta_with_another_base_falls_back_to_full_files(world: World) -> None:
    manifest = world.publish(1)
    wrong = world.cloud.publish(2, world.bundles[1], bases=[world.bundles[2]]).deltas[0]

    def lie(m: release_pb2.Manifest) -> None:
        del m.deltas[:]
        m.deltas.add(
            base_sha256=manifest.deltas[0].base_sha256,
            target_sha256=wrong.target_sha256,
            sha256=wrong.sha256,
            size=wrong.size,
        )

    world.publish(1, change=lie)
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)
    weights = {f.name: f.sha256 for f in manifest.files}["weights.bin"]
    assert {wrong.sha256, weights} <= {sha for sha, _ in world.cloud.reads}


def test_a_truncated_delta_falls_back_to_full_files(world: World) -> None:
    delta = world.publish(1).deltas[0]
    cut = world.cloud.blobs[delta.sha256][:-20]

    def lie(m: release_pb2.Manifest) -> None:
        m.deltas[0].sha256 = hashlib.sha256(cut).hexdigest()
        m.deltas[0].size = len(cut)
        world.cloud.blobs[m.deltas[0].sha256] = cut

    world.publish(1, change=lie)
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)


def test_a_delta_that_the_cloud_lost_falls_back_to_full_files(world: World) -> None:
    del world.cloud.blobs[world.publish(1).deltas[0].sha256]
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)


def test_a_file_that_the_cloud_lost_ends_in_failure(world: World) -> None:
    manifest = world.publish(1)
    del world.cloud.blobs[{f.name: f.sha256 for f in manifest.files}["harness.json"]]
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[0], 0)
    assert "no file" in world.cloud.reports[-1].detail


@pytest.mark.parametrize("name", ["weights.bin", "graph.onnx"])
def test_a_base_that_was_altered_on_the_disk_is_not_built_on(world: World, name: str) -> None:
    world.publish(1)
    agent = world.agent()
    file = agent.slots.folder(world.digests[0]) / name
    file.write_bytes(bytes(WEIGHTS))
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)


def test_a_base_that_is_altered_after_it_was_checked_is_noticed(world: World) -> None:
    world.publish(1)
    agent = world.agent()
    file = agent.slots.folder(world.digests[0]) / "weights.bin"
    world.cloud.on_read = lambda: file.write_bytes(bytes(WEIGHTS))
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)


def test_a_disk_that_stays_full_ends_in_failure_and_leaves_room(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.publish(1)
    agent = world.agent()
    write, tries = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".part":
            tries.append(descriptor)
            raise FULL_DISK
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    agent.update()
    assert len(tries) == MAX_DISK_TRIES
    assert agent.check() == Entry(world.digests[0], 0)
    assert "No space left" in world.cloud.reports[-1].detail
    assert not (world.state / "downloads").exists()
