"""What is in deploy/ fits the code: metrics, options of commands, a broker's configuration."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import time
from contextlib import closing
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import typer
import yaml
from prometheus_client import CollectorRegistry

from cloud import cli
from cloud.curator import Curator, CuratorConfig
from cloud.db import open_database
from cloud.evidence.ingest import Ingest
from cloud.evidence.metrics import IngestMetrics
from cloud.evidence.store import EvidenceStore
from cloud.fleet.service import FleetService
from cloud.jobs import Jobs
from cloud.releases.repository import Repository
from cloud.releases.store import ReleaseStore
from cloud.rollout.driver import RolloutDriver
from edge.link.address import parse_address
from edge.link.metrics import LinkMetrics
from edge.link.outbox import DEMONSTRATION, Outbox
from edge.link.uplink import InService, Uplink
from edge.metrics import DeviceMetrics
from edge.update.metrics import UpdateMetrics
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
}
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed"
)


@pytest.fixture(scope="module")
def sample_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the samples that a device and a cloud export, out of their real registries."""
    state = tmp_path_factory.mktemp("cloud")
    device, cloud = CollectorRegistry(), CollectorRegistry()
    DeviceMetrics(device).watch_student(lambda: ("d" * 64, 1))
    LinkMetrics(device)
    UpdateMetrics(device)
    IngestMetrics(cloud, channels=["home"])
    engine = open_database(state / "cloud.sqlite")
    releases = ReleaseStore(
        folder=state,
        engine=engine,
        repository=Repository(state=state, clock=time.time, registry=cloud),
        clock=time.time,
        registry=cloud,
    )
    driver = RolloutDriver(engine=engine, clock=time.time, registry=cloud)
    FleetService(store=releases, driver=driver, registry=cloud)
    Curator(
        channel="home",
        bundle=state,
        masters=state,
        evidence=EvidenceStore(engine, clock=time.time),
        releases=releases,
        driver=driver,
        jobs=Jobs(state / "jobs"),
        config=CuratorConfig(),
        registry=cloud,
    )
    names = {
        family.name + suffix
        for registry in (device, cloud)
        for family in registry.collect()
        for suffix in SUFFIXES.get(family.type, ("",))
    }
    engine.dispose()
    return names


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\banabranch_[a-z_]+", text))


def test_every_metric_that_an_alert_names_is_exported(sample_names: set[str]) -> None:
    assert set().union(*(names_in(rule["expr"]) for rule in alerts())) <= sample_names


def test_every_alert_says_how_bad_it_is_and_what_it_means() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}, rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]


def test_the_reference_lists_exactly_the_metrics_that_are_exported(sample_names: set[str]) -> None:
    text = (ROOT / "docs/reference/metrics.md").read_text()
    documented = set(re.findall(r"^\| `(anabranch_[a-z_]+)", text, flags=re.MULTILINE))
    exported = {re.sub(r"_(bucket|sum|count)$", "", name) for name in sample_names}
    assert documented == exported


def test_prometheus_scrapes_the_default_addresses() -> None:
    jobs = yaml.safe_load((PROMETHEUS / "scrape.yml").read_text())["scrape_configs"]
    scraped = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined] # a group
    defaults = {
        f"anabranch-{name}": [p.default]
        for name in ("cloud", "edge")
        for p in commands[name].params
        if p.name == "metrics"
    }
    assert scraped == defaults


@needs_promtool
@pytest.mark.parametrize(
    "command",
    ["check rules alerts.yml", "check config scrape.yml", "test rules alerts_test.yml"],
)
def test_promtool_accepts(command: str) -> None:
    done = subprocess.run(
        ["promtool", *command.split()],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["edge", "cloud"])
def test_a_service_gives_its_command_options_that_it_has(name: str) -> None:
    unit = configparser.RawConfigParser(strict=False, comment_prefixes=("#",))
    unit.optionxform = str  # type: ignore[assignment,method-assign] # keep upper case
    text = (ROOT / f"deploy/systemd/anabranch-{name}.service").read_text()
    unit.read_string(text.replace("\\\n", ""))
    program, command, *arguments = shlex.split(unit["Service"]["ExecStart"])
    assert (Path(program).name, command) == ("anabranch", name)
    group = typer.main.get_command(cli.app)
    called = group.commands[name]  # type: ignore[attr-defined] # it is a group
    context = called.make_context(name, arguments)
    assert context.params["state"] == Path(f"%S/anabranch-{name}")
    assert context.params["metrics"].startswith("127.0.0.1:")
    assert unit["Service"]["Restart"] == "always"


@pytest.fixture
def mosquitto(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[str]:
    """Run Mosquitto with the configuration of deploy/, on a free port."""
    program = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin") or shutil.which(
        "mosquitto"
    )
    if program is None:
        pytest.skip("mosquitto is not installed")
    listen = f"127.0.0.1:{free_port()}"
    config = (ROOT / "deploy/mosquitto/mosquitto.conf").read_text()
    assert "listener 1883 127.0.0.1" in config
    file = tmp_path / "mosquitto.conf"
    port = listen.rpartition(":")[2]
    file.write_text(config.replace("listener 1883", f"listener {port}"))
    tmp_path.chmod(0o755)  # it drops root before it reads some of its files
    with subprocess.Popen([program, "-c", str(file)]) as running:
        yield listen
        running.terminate()


def test_evidence_reaches_the_cloud_through_mosquitto_as_configured(
    mosquitto: str, tmp_path: Path, eventually: Callable[[Callable[[], object]], None]
) -> None:
    engine = open_database(tmp_path / "cloud.sqlite")
    store = EvidenceStore(engine, clock=time.time)
    registry = CollectorRegistry()
    ingest = Ingest(
        address=parse_address(mosquitto),
        store=store,
        metrics=IngestMetrics(registry, channels=["home"]),
        random=Random(),
    )
    message = device_pb2.Demonstration(
        id="01900000-0000-7000-8000-000000000001",
        channel="home",
        device="lamp-1",
        student="d" * 64,
        created_ms=1_700_000_000_000,
        messages=[device_pb2.ChatMessage(role="user", content="lights on")],
        correction="{}",
        source=device_pb2.SOURCE_CORRECTION,
    )
    with closing(Outbox(tmp_path / "outbox.sqlite", clock=time.time)) as outbox:
        outbox.put(DEMONSTRATION, message.id, message.SerializeToString())
        uplink = Uplink(
            channel="home",
            device="lamp-1",
            agent_version="0.1.0",
            address=parse_address(mosquitto),
            outbox=outbox,
            in_service=lambda: InService("d" * 64, 0),
            metrics=LinkMetrics(CollectorRegistry()),
            clock=time.time,
            random=Random(0),
        )
        ingest.start()
        uplink.start()
        try:
            eventually(lambda: outbox.counts().waiting == 0)
            assert store.demonstrations("home") == [message]
        finally:
            uplink.stop(0.1)
            ingest.stop()
            engine.dispose()
