"""The driver on a real database: restarts, several threads, who is woken, what is counted."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry

from cloud.db import open_database, write
from cloud.rollout.driver import RolloutChannelRow, RolloutDriver
from cloud.rollout.events import Abort, Outcome, Pause, Report, Resume
from cloud.rollout.plan import Plan
from cloud.rollout.state import Content, Health, Phase, Wanted
from protos.errors import IntegrityError, InvalidInputError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

OLD, NEW = "aa" * 32, "bb" * 32


class Cloud:
    """A driver that can be restarted, with a clock that stands still unless moved."""

    def __init__(self, path: Path, plan: Plan | None = None) -> None:
        self.path = path
        self.plan = plan or Plan()
        self.now = 1e9
        self.restart()

    def restart(self) -> None:
        self.registry = CollectorRegistry()
        self.engine = open_database(self.path)
        self.driver = RolloutDriver(
            engine=self.engine, clock=lambda: self.now, registry=self.registry, plan=self.plan
        )

    def connect(self, *devices: str, student: str = OLD, release: int = 1) -> None:
        for device in devices:
            self.driver.connected("home", device, student=student, release=release)

    def told(self) -> set[str]:
        state = self.driver.state("home")
        return {d for d in state.devices if state.target(d) == state.version}

    def phase(self) -> Phase:
        return self.driver.state("home").phase

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"channel": "home", **labels})


def committed(device: str, sequence: int = 1, student: str = NEW, release: int = 2) -> Report:
    return Report(device, release, Outcome.COMMITTED, student, sequence)


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path / "cloud.db")


def test_a_restart_at_any_moment_changes_nothing_but_who_is_online(cloud: Cloud) -> None:
    names = ["attic", "hall", "porch"]
    cloud.connect(*names)
    cloud.driver.begin("home", 2, student=NEW, devices=["cellar"])
    for sequence in range(1, 10):
        before = cloud.driver.state("home")
        cloud.restart()
        after = cloud.driver.state("home")
        assert (after.phase, after.wave, after.plan) == (before.phase, before.wave, before.plan)
        assert {d.name: (d.health, d.wave) for d in after.devices.values()} == {
            d.name: (d.health, d.wave) for d in before.devices.values()
        }
        assert not any(d.online for d in after.devices.values())
        cloud.connect(*names)
        if cloud.phase() is Phase.DONE:
            break
        for device in cloud.told():
            assert cloud.driver.report("home", committed(device, sequence))
    assert cloud.phase() is Phase.DONE
    assert cloud.told() == set(names)


def test_time_that_the_cloud_was_down_is_not_a_devices_silence(cloud: Cloud) -> None:
    cloud.connect("hall")
    cloud.driver.begin("home", 2, student=NEW)
    cloud.now += 1e6
    cloud.restart()
    cloud.driver.tick()
    assert cloud.phase() is Phase.RUNNING
    cloud.now += cloud.plan.silence_s + 1
    cloud.driver.tick()
    assert cloud.phase() is Phase.HALTED
    cloud.restart()
    assert cloud.phase() is Phase.HALTED


_KILLED = """
import os, pathlib, signal, sys
from prometheus_client import CollectorRegistry
from cloud.db import open_database
from cloud.rollout.driver import RolloutDriver
from cloud.rollout.events import Outcome, Report

driver = RolloutDriver(engine=open_database(pathlib.Path(sys.argv[1])), clock=lambda: 1e9,
                       registry=CollectorRegistry())
for device in ("attic", "hall"):
    driver.connected("home", device, student="aa" * 32, release=1)
driver.begin("home", 2, student="bb" * 32)
first = next(d.name for d in driver.state("home").devices.values() if d.wave == 0)
driver.report("home", Report(first, 2, Outcome.COMMITTED, "bb" * 32, 5))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_accepted_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "cloud.db"
    process = subprocess.run([sys.executable, "-c", _KILLED, str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    cloud = Cloud(path)
    assert cloud.driver.state("home").wave == 1
    assert cloud.told() == {"attic", "hall"}


def test_an_event_that_cannot_be_stored_is_not_accepted(cloud: Cloud) -> None:
    cloud.connect("hall")
    cloud.driver.begin("home", 2, student=NEW)
    before = cloud.driver.state("home")
    with cloud.engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
    failed = Report("hall", 2, Outcome.FAILED, OLD, 1, detail="x" * 50_000)
    with pytest.raises(StorageError):
        cloud.driver.report("home", failed)
    assert cloud.driver.state("home") is before
    with cloud.engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert cloud.driver.report("home", failed)
    assert cloud.phase() is Phase.HALTED


def test_an_older_report_is_not_accepted_and_the_same_one_is(cloud: Cloud) -> None:
    cloud.connect("hall")
    cloud.driver.begin("home", 2, student=NEW)
    assert cloud.driver.report("home", committed("hall", 7))
    cloud.restart()
    assert cloud.driver.report("home", committed("hall", 7))
    assert not cloud.driver.report("home", committed("hall", 6))


def test_a_device_is_offline_when_its_last_stream_has_ended(cloud: Cloud) -> None:
    cloud.connect("hall")
    cloud.connect("hall")
    cloud.driver.disconnected("home", "hall")
    assert cloud.driver.state("home").devices["hall"].online
    cloud.driver.disconnected("home", "hall")
    assert not cloud.driver.state("home").devices["hall"].online


def test_devices_that_connected_before_the_first_release_are_told_of_it(cloud: Cloud) -> None:
    cloud.connect("hall", release=0)
    assert cloud.phase() is Phase.IDLE
    cloud.driver.begin("home", 1, student=OLD)
    assert cloud.phase() is Phase.DONE
    assert cloud.driver.target("home", "hall") == 1


def test_channels_go_their_own_ways_at_once_and_after_a_restart(cloud: Cloud) -> None:
    driver = cloud.driver
    for channel, device in (("home", "hall"), ("office", "hall"), ("office", "desk")):
        driver.connected(channel, device, student=OLD, release=1)
    driver.begin("home", 2, student=NEW)
    driver.begin("office", 7, student="cc" * 32)
    assert driver.target("home", "hall") == 2
    driver.report("office", committed("hall", student="cc" * 32, release=7))
    driver.obey("office", Pause())
    assert cloud.phase() is Phase.RUNNING, "home goes on"
    driver.report("home", committed("hall"))
    cloud.restart()
    assert cloud.phase() is Phase.DONE
    office = cloud.driver.state("office")
    assert (office.version, office.phase) == (7, Phase.PAUSED)
    assert set(cloud.driver.states()) == {"home", "office"}
    assert office.devices["hall"].student != cloud.driver.state("home").devices["hall"].student


def test_only_who_has_a_new_target_is_woken(cloud: Cloud) -> None:
    woken: list[str] = []
    cloud.connect("attic", "hall")
    cloud.driver.begin("home", 2, student=NEW)
    (first,) = cloud.told()
    (second,) = {"attic", "hall"} - {first}
    with (
        cloud.driver.woken("home", first, lambda: woken.append(first)),
        cloud.driver.woken("home", second, lambda: woken.append(second)),
    ):
        cloud.driver.report("home", Report(first, 2, Outcome.PROGRESS, OLD, 1))
        assert woken == []
        cloud.driver.report("home", committed(first, 2))
        assert woken == [second]
    cloud.driver.begin("home", 3, student="cc" * 32)
    assert woken == [second], "who left is not woken"


def test_a_rollback_that_is_due_is_known_after_a_restart(cloud: Cloud) -> None:
    cloud.connect("hall")
    cloud.driver.begin("home", 2, student=OLD)
    cloud.driver.begin("home", 3, student=NEW)
    assert cloud.driver.obey("home", Abort("complaints"))
    cloud.restart()
    assert cloud.driver.wanted("home") == Wanted(Content(2, OLD))
    cloud.driver.begin("home", 4, student=OLD)
    assert cloud.driver.wanted("home") is None


def test_a_pause_outlives_a_restart(cloud: Cloud) -> None:
    cloud.connect("hall")
    cloud.driver.begin("home", 2, student=NEW)
    cloud.driver.obey("home", Pause())
    cloud.restart()
    assert cloud.phase() is Phase.PAUSED
    cloud.driver.obey("home", Resume())
    assert cloud.phase() is Phase.RUNNING


def test_reports_from_many_threads_all_count(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path / "cloud.db", Plan(waves=(40, "rest"), min_healthy_share=1.0))
    names = [f"device-{n}" for n in range(40)]
    cloud.connect(*names)
    cloud.driver.begin("home", 2, student=NEW)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda d: cloud.driver.report("home", committed(d)), names))
    assert cloud.phase() is Phase.DONE
    cloud.restart()
    healths = {d.health for d in cloud.driver.state("home").devices.values()}
    assert healths == {Health.COMMITTED}


def test_a_waker_may_ask_the_driver(cloud: Cloud) -> None:
    targets: list[int] = []
    done = threading.Event()

    def ask() -> None:
        targets.append(cloud.driver.target("home", "hall"))
        done.set()

    def wake() -> None:
        threading.Thread(target=ask).start()
        done.wait(10)

    cloud.connect("hall")
    with cloud.driver.woken("home", "hall", wake):
        cloud.driver.begin("home", 2, student=NEW)
    assert targets == [2]


def test_metrics_count_devices_by_wave_and_state_without_naming_them(cloud: Cloud) -> None:
    cloud.connect("attic", "hall", "porch")
    cloud.driver.begin("home", 2, student=NEW)
    (first,) = cloud.told()
    devices = "anabranch_rollout_devices"
    assert cloud.value(devices, wave="0", state="updating") == 1
    assert cloud.value(devices, wave="none", state="waiting") == 2
    cloud.driver.report("home", committed(first))
    assert cloud.value(devices, wave="0", state="committed") == 1
    assert cloud.value(devices, wave="1", state="updating") == 2
    assert cloud.value(devices, wave="none", state="waiting") == 0
    assert cloud.value("anabranch_rollout_state", state="running") == 1
    assert cloud.value("anabranch_rollout_state", state="done") == 0
    assert cloud.value("anabranch_release_version") == 2


def test_damaged_state_is_an_error_and_not_a_fresh_start(cloud: Cloud) -> None:
    cloud.driver.begin("home", 2, student=NEW)
    with write(cloud.engine) as session:
        session.merge(RolloutChannelRow(channel="home", header="{"))
    with pytest.raises(IntegrityError, match="rollout_channels"):
        cloud.restart()


def test_malformed_names_are_refused(cloud: Cloud) -> None:
    with pytest.raises(InvalidInputError):
        cloud.driver.begin("a/b", 1, student=OLD)
    with pytest.raises(InvalidInputError):
        cloud.driver.begin("home", 1, student=OLD, devices=["#"])
