"""Orders and the commands that give them, on a cloud's real database, beside a running driver."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry

from cloud.cli import main
from cloud.db import create_tables, open_database, write
from cloud.releases.tables import ReleaseRow
from cloud.rollout.driver import RolloutDriver
from cloud.rollout.events import Pin, Resume
from cloud.rollout.orders import OrderRow, Orders
from cloud.rollout.state import Content, Phase, Wanted
from edge.process import locked

if TYPE_CHECKING:
    from pathlib import Path

OLD, NEW = "aa" * 32, "bb" * 32
Anabranch = Callable[..., tuple[int, str]]


class Cloud:
    """A driver on a state folder, with two devices and release 2 in its first wave."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.engine = open_database(state / "cloud.sqlite")
        create_tables(self.engine, ReleaseRow)
        self.driver = RolloutDriver(
            engine=self.engine, clock=lambda: 1e9, registry=CollectorRegistry()
        )
        with write(self.engine) as session:
            for version, student in ((1, OLD), (2, NEW)):
                session.add(
                    ReleaseRow(
                        channel="home", version=version, student=student, manifest="",
                        manifest_bytes=0, way_back="", way_back_bytes=0, created_ms=0,
                        withdrawn=False, full_bytes=0, delta_bytes=0,
                    )
                )  # fmt: skip
        for device in ("attic", "hall"):
            self.driver.connected("home", device, student=OLD, release=1)
        self.driver.begin("home", 1, student=OLD)
        self.driver.begin("home", 2, student=NEW)

    def phase(self) -> Phase:
        return self.driver.state("home").phase

    @contextmanager
    def runs(self) -> Iterator[None]:
        """It holds its folder and ticks, as the cloud's process does."""
        stop = threading.Event()

        def tick() -> None:
            while not stop.wait(0.02):
                self.driver.tick()

        thread = threading.Thread(target=tick)
        with locked(self.state):
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


@pytest.fixture
def anabranch(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Anabranch:
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["anabranch", *arguments, "--state", str(cloud.state)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out + said.err

    return command


def test_orders_reach_a_running_cloud_and_say_what_came_of_them(
    cloud: Cloud, anabranch: Anabranch
) -> None:
    with cloud.runs():
        assert anabranch("rollout", "pause") == (0, "order 1: done\n")
        assert cloud.phase() is Phase.PAUSED
        assert "nothing to change: release 2 is paused" in anabranch("rollout", "pause")[1]
        anabranch("rollout", "resume")
        assert cloud.phase() is Phase.RUNNING
        anabranch("rollout", "abort", "--reason", "people complain")
    assert cloud.phase() is Phase.ABORTED
    assert cloud.driver.state("home").reason == "people complain"
    assert cloud.driver.wanted("home") == Wanted(Content(1, OLD))


def test_orders_for_a_cloud_that_does_not_run_wait_for_it(
    cloud: Cloud, anabranch: Anabranch
) -> None:
    assert "it obeys when it starts" in anabranch("rollout", "pause")[1]
    assert cloud.phase() is Phase.RUNNING
    again = RolloutDriver(engine=cloud.engine, clock=lambda: 1e9, registry=CollectorRegistry())
    again.tick()
    assert again.state("home").phase is Phase.PAUSED
    again.tick()
    assert Orders(cloud.engine).pending() == []


def test_a_rollback_brings_the_last_good_release_or_a_given_one_at_any_time(
    cloud: Cloud, anabranch: Anabranch, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('waves = ["rest"]\nwindows = ["02:00-05:00"]\ntime_zone = "Europe/Berlin"\n')
    with cloud.runs():
        assert anabranch("rollout", "rollback", "--plan", str(plan))[0] == 0
    wanted = cloud.driver.wanted("home")
    assert wanted is not None
    assert (wanted.content, cloud.phase()) == (Content(1, OLD), Phase.ABORTED)
    cloud.driver.begin("home", 3, student=OLD)
    assert cloud.driver.wanted("home") is None
    assert cloud.driver.state("home").plan.windows == ("02:00-05:00",)
    with cloud.runs():
        assert anabranch("rollout", "rollback", "--to", "2")[0] == 0
        code, said = anabranch("rollout", "rollback", "--to", "3")
    assert (code, "has no release 3" in said) == (1, True)
    wanted = cloud.driver.wanted("home")
    assert wanted is not None
    assert wanted.content == Content(2, NEW)


def test_a_release_is_started_anew_without_giving_the_present_one_up(
    cloud: Cloud, anabranch: Anabranch
) -> None:
    with cloud.runs():
        anabranch("rollout", "start", "--release", "2")
    assert cloud.phase() is Phase.RUNNING
    assert cloud.driver.wanted("home") == Wanted(Content(2, NEW))


def test_a_device_is_pinned_where_it_is_and_let_go(cloud: Cloud, anabranch: Anabranch) -> None:
    devices = cloud.driver.state("home").devices
    told = next(name for name in devices if cloud.driver.target("home", name) == 2)
    with cloud.runs():
        assert anabranch("device", "pin", told)[0] == 0
        assert cloud.driver.target("home", told) == 1
        assert "pinned at 1" in anabranch("rollout", "show")[1]
        code, said = anabranch("device", "pin", told, "--release", "7")
        assert (code, "there is no release 7" in said) == (1, True)
        anabranch("device", "unpin", told)
        assert cloud.driver.target("home", told) in (0, 2)
        assert anabranch("device", "unbox", told)[0] == 0
        assert "knows no device 'nobody'" in anabranch("device", "pin", "nobody")[1]


def test_lists_are_tables_for_people_and_json_for_scripts(
    cloud: Cloud, anabranch: Anabranch
) -> None:
    del cloud
    assert "running" in anabranch("rollout", "list")[1]
    (row,) = json.loads(anabranch("rollout", "list", "--json")[1])
    assert (row["channel"], row["release"], row["phase"]) == ("home", 2, "running")
    note = json.loads(anabranch("rollout", "show", "--json")[1])
    assert {d["device"] for d in note["devices"]} == {"attic", "hall"}
    assert note["plan"]["waves"] == [1, "rest"]
    code, said = anabranch("rollout", "pause", "--channel", "office")
    assert (code, "no channel 'office'" in said) == (1, True)


def test_an_order_that_nobody_understands_is_refused_and_holds_up_no_other(cloud: Cloud) -> None:
    orders = Orders(cloud.engine)
    number = orders.give("home", Pin("hall", 1), person="eve", now_ms=1)
    with write(cloud.engine) as session:
        row = session.get(OrderRow, number)
        assert row is not None
        row.body = '{"order": "dance"}'
    orders.give("home", Resume(), person="eve", now_ms=2)
    cloud.driver.tick()
    assert orders.pending() == []
    refused = orders.find(number)
    assert refused is not None
    assert refused.refused


def test_a_plan_that_makes_no_sense_is_refused_before_anything_is_ordered(
    cloud: Cloud, anabranch: Anabranch, tmp_path: Path
) -> None:
    for text in ("waves = [1]", "wave = 1", "windows = ['25:00-26:00']", "time_zone = 'Mars'", "="):
        (tmp_path / "plan.toml").write_text(text)
        plan = ("--plan", str(tmp_path / "plan.toml"))
        code, said = anabranch("rollout", "start", "--release", "1", *plan)
        assert (code, said.startswith("anabranch: ")) == (1, True)
    assert Orders(cloud.engine).pending() == []
