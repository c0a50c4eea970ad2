"""SIGKILL to each process in the middle: no demonstration is lost, and the loop goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loop.loop_processes import People, Town
else:
    from loop_processes import People, Town

FreePort = Callable[[], int]
pytestmark = pytest.mark.timeout(1800)


def kept(town: Town) -> list[str]:
    """Ids of every demonstration that a device said it keeps."""
    return sorted(i for device in town.devices for i in device.told)


@pytest.mark.parametrize("victim", ["device-0", "cloud", "broker"])
def test_no_demonstration_is_lost_when_a_process_is_killed(
    tmp_path: Path, tiny_student: Path, free_port: FreePort, victim: str
) -> None:
    with Town(tmp_path, tiny_student, free_port, devices=1) as town:
        device = town.devices[0]
        with People(town) as people:
            town.until(lambda: len(device.told) >= 10)
            town.kill(victim)
            before = len(device.told)
            if victim != "device-0":  # people are served all the same
                town.until(lambda: len(device.told) >= before + 10)
                assert people.failures == []
            town.start(victim)
            town.until(lambda: len(device.told) >= before + 20)
        town.until(lambda: town.settled(1))
        assert sorted(town.stored()) == kept(town)


def test_a_demonstration_survives_sigkill_of_everything_before_its_ack(
    tmp_path: Path, tiny_student: Path, free_port: FreePort
) -> None:
    with Town(tmp_path, tiny_student, free_port, devices=1) as town:
        device = town.devices[0]
        town.kill("cloud")  # nobody stores, nobody acknowledges
        device.correct("lights on", '{"on":1}')
        device.correct("lights off", '{"on":0}')
        assert device.health()["outbox"]["waiting"] == 2
        for name in ("device-0", "broker"):
            town.kill(name)
        for name in ("broker", "cloud", "device-0"):
            town.start(name)
        town.until(lambda: town.settled(1))
        assert sorted(town.stored()) == kept(town)
        assert device.health()["memory"]["demonstrations"] == 2


def test_a_job_of_a_killed_cloud_runs_again_and_gives_one_release(
    tmp_path: Path, tiny_student: Path, free_port: FreePort
) -> None:
    with Town(tmp_path, tiny_student, free_port, devices=1, demonstrations=20) as town:
        with People(town) as people:
            town.until(town.learning)
            town.kill("cloud")
            people.correcting = False
            town.start("cloud")
            town.until(lambda: town.settled(2))
        assert people.failures == []
        job, release = town.job(), town.manifest(2)
        assert job is not None
        assert job.result is not None
        assert (job.version, release.student) == (2, job.result["student"])
        assert set(job.evidence.learn) <= set(release.learned_from)
        assert "it runs again" in town.log("cloud")
        assert len(town.jobs.all()) == 1
        assert town.newest() == 2
        assert sorted(town.stored()) == kept(town)


def test_a_device_killed_as_its_release_arrives_commits_it_later(
    tmp_path: Path, tiny_student: Path, free_port: FreePort
) -> None:
    with Town(tmp_path, tiny_student, free_port, devices=1, demonstrations=20) as town:
        with People(town) as people:
            town.until(town.job)
            people.correcting = False
            town.until(lambda: town.newest() == 2)
            town.kill("device-0")
            town.start("device-0")
            town.until(lambda: town.settled(2))
        assert town.devices[0].health()["student"] == town.manifest(2).student
        assert sorted(town.stored()) == kept(town)
