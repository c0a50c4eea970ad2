"""Updates against a cloud in memory: which releases a device takes, and how it comes to them."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import time
from typing import TYPE_CHECKING

import pytest

from edge.student.bundle import digest
from edge.update.slots import Entry

if TYPE_CHECKING:
    from pathlib import Path

    from protos.v1 import release_pb2
    from tests.update.update_repository import DAY_S, TufRepository
    from tests.update.update_simulator import CHANNEL, NOW, WEIGHTS, Agent, World, raising
else:
    from update_repository import DAY_S, TufRepository
    from update_simulator import CHANNEL, NOW, WEIGHTS, Agent, World, raising


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_device_comes_to_a_release_by_a_delta(world: World) -> None:
    manifest, agent = world.publish(1), world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)
    assert agent.wiped == ["demonstration-1"]
    assert world.cloud.told == ["fetching", "verifying", "applying", "probing", "committed"]
    fetched = {sha for sha, _ in world.cloud.reads}
    weights = {f.name: f.sha256 for f in manifest.files}["weights.bin"]
    assert manifest.deltas[0].sha256 in fetched
    assert weights not in fetched
    last = world.cloud.reports[-1]
    assert (last.release, last.student, last.probe_equal_share) == (1, world.digests[1], 1.0)
    harness = {f.name: f.size for f in manifest.files}["harness.json"]
    assert last.delta_bytes == manifest.deltas[0].size + harness
    assert agent.metric("anabranch_updates_total", result="committed") == 1
    assert agent.metric("anabranch_update_state", anabranch_update_state="idle") == 1
    bytes_ = agent.metric("anabranch_update_fetched_bytes_total", kind="delta")
    assert bytes_ == manifest.deltas[0].size
    assert not (world.state / "downloads").exists()


def test_what_did_not_change_is_shared_with_the_old_slot(world: World) -> None:
    world.publish(1)
    agent = world.agent()
    agent.update()
    for name, links in (("graph.onnx", 2), ("weights.bin", 1)):
        assert (agent.slots.folder(world.digests[1]) / name).stat().st_nlink == links


def test_where_links_fail_files_are_copied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.publish(1)
    agent = world.agent()
    monkeypatch.setattr(os, "link", lambda *_: raising(OSError(errno.EPERM, "no links"))())
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)


def test_nothing_is_done_twice(world: World) -> None:
    world.publish(1)
    agent = world.agent()
    agent.update()
    agent.update()
    reads = len(world.cloud.reads)
    again = world.agent()
    again.update()
    assert (again.wiped, len(world.cloud.reads)) == ([], reads)
    assert again.check() == Entry(world.digests[1], 1)


def test_progress_and_sequence_grow(world: World) -> None:
    world.publish(1)
    seen: list[tuple[str, int, int]] = []
    agent = Agent(world.state, world.bundles[0], world.cloud, progress=lambda *p: seen.append(p))
    agent.update()
    assert seen[-1][1] == seen[-1][2]
    assert [s[1] for s in seen] == sorted(s[1] for s in seen)
    world.publish(2)
    world.agent().update()
    sequences = [r.sequence for r in world.cloud.reports]
    assert sequences == sorted(set(sequences))
    assert {r.release for r in world.cloud.reports} == {1, 2}


def test_slots_of_older_releases_are_deleted(world: World) -> None:
    agent = world.agent()
    for n in (1, 2, 3):
        world.publish(n)
        agent.update()
    agent.check()
    assert agent.slots.pointer().previous == Entry(world.digests[2], 2)
    assert not agent.slots.folder(world.digests[1]).exists()


def test_a_release_with_an_old_student_is_just_another_release(world: World) -> None:
    agent = world.agent()
    for n in (1, 2):
        world.publish(n)
        agent.update()
    reads = len(world.cloud.reads)
    world.cloud.publish(3, world.bundles[1])
    agent.update()
    assert agent.check() == Entry(world.digests[1], 3)
    assert len(world.cloud.reads) == reads  # its slot was still there


def test_a_release_with_the_same_student_only_moves_the_version(world: World) -> None:
    world.cloud.publish(1, world.bundles[0])
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[0], 1)
    assert (agent.wiped, world.cloud.reads) == (["demonstration-1"], [])


def test_a_manifest_by_other_keys_is_refused(world: World) -> None:
    ours, world.cloud.repository = world.cloud.repository, TufRepository(NOW, seed="strangers")
    world.publish(1)
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[0], 0)
    assert "timestamp was signed by 0/1 keys" in world.cloud.reports[-1].detail
    assert "--trust" in world.cloud.reports[-1].detail
    agent.update()
    assert world.cloud.told == ["fetching", "failed"]
    world.cloud.repository = ours
    world.publish(2)
    agent.update()
    assert agent.check() == Entry(world.digests[2], 2)


def test_metadata_that_looks_expired_is_waited_for_and_the_old_student_serves(
    world: World,
) -> None:
    world.publish(1)
    agent = world.agent()
    world.cloud.skew = 10 * 365 * 86_400
    said: list[str] = []

    def look() -> None:
        said.append(agent.client.status.detail)
        assert agent.student.digest == world.digests[0]
        if len(said) == 7:
            world.cloud.skew = 0  # somebody has set the clock

    world.cloud.on_metadata = look
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)
    assert any("this device's time: its clock is wrong" in detail for detail in said)
    assert (agent.metric("anabranch_update_expired_total") or 0) >= 1
    assert "failed" not in world.cloud.told
    assert agent.client.status.detail == ""


def test_a_device_that_hears_of_no_release_knows_until_when_it_is_not_held_back(
    world: World,
) -> None:
    agent = world.agent()
    name = "anabranch_trust_fresh_until_timestamp_seconds"
    assert math.isnan(agent.metric(name) or 0)
    agent.client.freshness()
    assert agent.metric(name) == NOW + DAY_S
    world.cloud.skew = DAY_S + 1
    agent.client.freshness()
    assert agent.metric(name) == NOW + DAY_S
    assert agent.metric("anabranch_update_expired_total") == 1
    world.cloud.online = False
    agent.client.freshness()
    assert agent.metric("anabranch_update_expired_total") == 1


def test_a_release_that_is_revoked_while_it_is_fetched_is_not_served(world: World) -> None:
    """Its key was stolen: the list that the new key signs does not have it."""
    world.publish(1)
    agent = world.agent()

    def revoke() -> None:
        world.cloud.on_read = lambda: None
        del world.cloud.repository.targets.targets[f"{CHANNEL}/1"]
        world.cloud.repository.rotate("targets", "new")
        world.cloud.repository.publish()

    world.cloud.on_read = revoke
    world.cloud.faults.append(1)  # the line is cut, and what is fetched is asked about again
    agent.update()
    assert agent.check() == Entry(world.digests[0], 0)
    assert f"lists no manifest {CHANNEL}/1" in world.cloud.reports[-1].detail


def test_an_old_manifest_for_a_new_release_is_refused(world: World) -> None:
    manifest = world.publish(1)
    agent = world.agent()
    agent.update()
    world.cloud.sign(2, manifest)
    world.cloud.target = 2
    agent.update()
    assert "of release 2 says that it is of 1" in world.cloud.reports[-1].detail
    assert agent.check() == Entry(world.digests[1], 1)


def test_an_older_target_is_ignored(world: World) -> None:
    agent = world.agent()
    for n in (1, 2):
        world.publish(n)
        agent.update()
    reports = len(world.cloud.reports)
    world.cloud.target = 1
    agent.update()
    world.cloud.target = 0
    agent.update()
    assert len(world.cloud.reports) == reports
    assert agent.check() == Entry(world.digests[2], 2)


def test_a_device_never_goes_back_past_what_it_committed(world: World) -> None:
    agent = world.agent()
    for n in (1, 2):
        world.publish(n)
        agent.update()
    (world.state / "slots" / "pointer.json").unlink()
    reborn = world.agent()
    assert reborn.client.status.serving == Entry(world.digests[0], 0)
    world.cloud.target = 1
    reborn.update()
    assert reborn.check() == Entry(world.digests[0], 0)
    world.cloud.target = 2
    reborn.update()
    assert reborn.check() == Entry(world.digests[2], 2)


def test_a_student_that_answers_otherwise_fails_its_probe(world: World) -> None:
    world.publish(1, change=lambda m: setattr(m.canaries[0], "answer", "something else"))
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[0], 0)
    assert world.cloud.told[-3:] == ["probing", "rolling_back", "failed"]
    assert "0% of canaries" in world.cloud.reports[-1].detail
    assert agent.wiped == []


def test_a_slow_student_fails_its_probe(world: World) -> None:
    world.publish(1, change=lambda m: setattr(m.bounds, "max_seconds", 0.5))
    agent = world.agent()
    agent.update()
    assert "a canary took" in world.cloud.reports[-1].detail
    assert agent.check() == Entry(world.digests[0], 0)


def test_a_big_student_fails_its_probe(world: World) -> None:
    world.publish(1, change=lambda m: setattr(m.bounds, "max_rss_bytes", 10))
    agent = world.agent()
    agent.rss = 11
    agent.update()
    assert "bytes, 10 are allowed" in world.cloud.reports[-1].detail
    assert agent.check() == Entry(world.digests[0], 0)


def test_a_student_that_cannot_be_opened_fails_its_probe(world: World) -> None:
    (world.bundles[3] / "weights.bin").write_bytes(b"short")
    files = {p.name: p.read_bytes() for p in world.bundles[3].iterdir()}
    (world.bundles[3] / "weights.bin").write_bytes(bytes(WEIGHTS))
    manifest = world.cloud.publish(1, world.bundles[3])
    (world.bundles[3] / "weights.bin").write_bytes(b"short")

    def broken(m: release_pb2.Manifest) -> None:
        for file in m.files:
            file.sha256 = hashlib.sha256(files[file.name]).hexdigest()
            file.size = len(files[file.name])
            world.cloud.blobs[file.sha256] = files[file.name]
        m.student = digest(world.bundles[3])

    broken(manifest)
    world.cloud.sign(1, manifest)
    agent = world.agent()
    agent.update()
    assert world.cloud.told[-2:] == ["rolling_back", "failed"]
    assert "cannot be opened" in world.cloud.reports[-1].detail
    assert agent.check() == Entry(world.digests[0], 0)


def test_without_room_for_two_the_old_student_is_closed_before_the_new_one_opens(
    world: World,
) -> None:
    world.publish(1)
    agent = world.agent()
    agent.room = False
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)
    assert agent.most_open == 1
    assert agent.metric("anabranch_update_unloads_total") == 1


@pytest.mark.parametrize("hook", ["open", "swap", "wipe"])
def test_without_room_for_two_the_old_student_comes_back_when_the_new_one_cannot_serve(
    world: World, hook: str
) -> None:
    world.publish(1)
    agent = world.agent()
    agent.room = False

    def once() -> None:
        del agent.hooks[hook]
        message = "no"
        raise RuntimeError(message)

    agent.hooks[hook] = once
    agent.update()
    assert agent.check() == Entry(world.digests[0], 0)
    assert agent.most_open == 1


def test_without_room_for_two_the_old_student_comes_back_when_the_release_is_withdrawn(
    world: World,
) -> None:
    world.publish(1)
    agent = world.agent()
    agent.room = False
    agent.hooks["open"] = lambda: agent.client.announce(0) if len(agent.opened) == 1 else None
    agent.update()
    assert agent.check() == Entry(world.digests[0], 0)
    assert agent.most_open == 1


def test_a_failed_student_is_not_tried_again_until_a_newer_release(world: World) -> None:
    world.publish(1, change=lambda m: setattr(m.bounds, "max_seconds", 0.5))
    world.agent().update()
    told = len(world.cloud.told)
    for agent in (world.agent(), world.agent()):
        agent.update()
        agent.update()
    assert len(world.cloud.told) == told
    world.cloud.publish(2, world.bundles[1], bases=[world.bundles[0]])
    agent = world.agent()
    agent.update()
    assert agent.check() == Entry(world.digests[1], 2)


@pytest.mark.parametrize("hook", ["swap", "wipe"])
def test_an_agent_that_fails_to_commit_gets_its_old_student_back(world: World, hook: str) -> None:
    world.publish(1)
    agent = world.agent()
    calls = iter([RuntimeError("the host is broken")])

    def once() -> None:
        for error in calls:
            raise error

    agent.hooks[hook] = once
    agent.update()
    assert agent.check() == Entry(world.digests[0], 0)
    assert world.cloud.told[-2:] == ["rolling_back", "failed"]
    assert "the host is broken" in world.cloud.reports[-1].detail


def test_a_rollback_that_fails_is_reported_as_inconsistent_and_healed(world: World) -> None:
    world.publish(1)
    agent = world.agent()
    agent.hooks["wipe"] = raising(RuntimeError("the memory is broken"))
    weights = agent.slots.folder(world.digests[0]) / "weights.bin"
    agent.hooks["swap"] = lambda: weights.write_bytes(b"gone")
    agent.update()
    assert world.cloud.told[-2:] == ["rolling_back", "inconsistent"]
    assert not agent.student.closed  # the new one serves: better than none
    agent.hooks.clear()
    world.publish(2)
    agent.update()
    assert agent.check() == Entry(world.digests[2], 2)


def test_an_inconsistent_device_is_consistent_after_a_restart(world: World) -> None:
    world.publish(1)
    agent = world.agent()
    agent.hooks["wipe"] = raising(RuntimeError("the memory is broken"))
    weights = agent.slots.folder(world.digests[0]) / "weights.bin"
    agent.hooks["swap"] = lambda: weights.write_bytes(b"gone")
    agent.update()
    reborn = world.agent()
    reborn.update()
    assert reborn.check().student in world.digests[:2]
    assert reborn.client.status.state == "idle"


def test_a_target_that_flips_while_fetching_is_followed(world: World) -> None:
    world.publish(1)
    world.publish(2)
    agent = world.agent()
    world.cloud.target = 1
    flips = iter([2])

    def flip() -> None:
        for version in flips:
            world.cloud.target = version
            agent.client.announce(version)

    world.cloud.on_read = flip
    agent.update()
    assert agent.check() == Entry(world.digests[2], 2)
    assert [r.release for r in world.cloud.reports][:2] == [1, 2]


@pytest.mark.parametrize("when", ["fetching", "probing"])
def test_a_release_that_is_withdrawn_does_not_get_into_service(world: World, when: str) -> None:
    world.publish(1)
    agent = world.agent()

    def withdraw() -> None:
        world.cloud.target = 0
        agent.client.announce(0)

    if when == "fetching":
        world.cloud.on_read = withdraw
    else:
        agent.hooks["open"] = withdraw
    agent.update()
    assert agent.check() == Entry(world.digests[0], 0)
    assert world.cloud.told[-2:] == [when, "idle"]
    world.cloud.on_read = lambda: None
    agent.hooks.clear()
    world.cloud.target = 1
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)


def test_reports_wait_for_the_cloud_across_restarts(world: World) -> None:
    world.publish(1)
    agent = world.agent()

    def down() -> None:
        world.cloud.online = False

    agent.hooks["open"] = down
    agent.update()
    assert agent.check() == Entry(world.digests[1], 1)
    assert world.cloud.told[-1] == "probing"
    reborn = world.agent()
    world.cloud.online = True
    reborn.update()
    assert world.cloud.told[-1] == "committed"
    world.agent().update()
    assert world.cloud.told.count("committed") == 1


def test_the_threads_update_and_stop(world: World) -> None:
    world.publish(1)
    agent = world.agent()
    agent.client.start()
    deadline = time.monotonic() + 20
    while world.cloud.told[-1:] != ["committed"] and time.monotonic() < deadline:
        time.sleep(0.01)
    agent.client.stop()
    assert agent.check() == Entry(world.digests[1], 1)
    assert agent.client.status.state == "idle"


def test_an_older_target_that_comes_between_judging_and_beginning_is_not_begun(
    world: World,
) -> None:
    for n in (1, 2):
        world.publish(n)
    agent = world.agent()
    agent.update()
    world.publish(3)

    def on_open() -> None:
        del agent.hooks["open"]
        agent.client.announce(4)  # supersedes release 3 during its probe...
        agent.hooks["close"] = lambda: agent.client.announce(1)  # ...and right after, an older one

    agent.hooks["open"] = on_open
    agent.update()
    assert agent.check() == Entry(world.digests[2], 2)
