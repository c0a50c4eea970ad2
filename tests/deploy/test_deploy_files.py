"""What is in deploy/ fits the code: metrics, options of commands, a broker's configuration."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client import CollectorRegistry

from cloud import cli
from cloud.curator import Curator, CuratorConfig
from cloud.db import open_database
from cloud.evidence.metrics import IngestMetrics
from cloud.evidence.store import EvidenceStore
from cloud.fleet.service import FleetService
from cloud.identity.metrics import IdentityMetrics
from cloud.jobs import Jobs
from cloud.releases.store import ReleaseStore
from cloud.rollout.driver import RolloutDriver
from edge.identity.metrics import CertificateMetrics
from edge.link.metrics import LinkMetrics
from edge.metrics import DeviceMetrics
from edge.update.metrics import UpdateMetrics

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
    CertificateMetrics(device)
    IdentityMetrics(cloud)
    IngestMetrics(cloud, channels=["home"])
    engine = open_database(state / "cloud.sqlite")
    releases = ReleaseStore(
        folder=state,
        engine=engine,
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
