"""The whole loop over real processes: corrected, learnt, released, in service everywhere."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.loop.loop_processes import Device, People, Town
else:
    from loop_processes import Device, People, Town

FreePort = Callable[[], int]
pytestmark = pytest.mark.timeout(1800)


def remembered(device: Device) -> set[str]:
    """Ids in a device's working memory."""
    path = device.state / "memory.sqlite"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return {row[0] for row in db.execute("SELECT id FROM demonstrations")}


def test_corrections_become_weights_on_every_device(
    tmp_path: Path, tiny_student: Path, free_port: FreePort
) -> None:
    with Town(tmp_path, tiny_student, free_port, devices=2, demonstrations=30) as town:
        first = town.manifest(1)
        with People(town) as people:
            town.until(town.job)
            people.correcting = False  # one release is enough to see
            town.until(town.released)
            town.until(lambda: town.settled(2))
        assert people.failures == []
        job, release = town.job(), town.manifest(2)
        assert job is not None
        assert job.result is not None
        assert job.result["passed"]
        assert release.student == job.result["student"] != first.student
        assert set(job.evidence.learn) <= set(release.learned_from)
        assert release.deltas
        told = [i for d in town.devices for i in d.told]
        assert sorted(town.stored()) == sorted(told)
        assert len(told) >= 30
        for device in town.devices:
            assert device.health()["student"] == release.student
            assert remembered(device) == set(device.told) - set(release.learned_from)
        assert town.metric('anabranch_adaptations_total{channel="home",result="released"}') == 1
        assert town.metric('anabranch_served_bytes_total{channel="home",kind="delta"}') > 0
        assert len(town.jobs.all()) == 1
