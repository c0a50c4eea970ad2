"""The commands together, as the how-to says: broker, cloud and a device as processes, all TLS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from edge.process import PARENT

Eventually = Callable[[Callable[[], object]], None]
CONFIG = Path(__file__).parents[2] / "deploy/mosquitto/mosquitto.conf"
MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin") or shutil.which("mosquitto")
pytestmark = [
    pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed"),
    pytest.mark.timeout(600),
]


class Processes:
    """Commands in the background, ended together."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self._stack = stack

    def start(self, name: str, *command: object) -> None:
        log = self._stack.enter_context((self.folder / f"{name}.log").open("w"))
        process = subprocess.Popen(
            [str(part) for part in command],
            stderr=log,
            stdout=log,
            env=os.environ | {PARENT: str(os.getpid())},
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)

    def anabranch(self, name: str, *arguments: object) -> None:
        self.start(name, sys.executable, "-m", "cloud.cli", *arguments)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", "cloud.cli", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with ExitStack() as stack:
        yield Processes(tmp_path, stack)


def test_from_zero_to_an_enrolled_device_and_to_a_revoked_one(
    tmp_path: Path,
    tiny_student: Path,
    processes: Processes,
    free_port: Callable[[], int],
    eventually: Eventually,
) -> None:
    state, folder, port = tmp_path / "cloud", tmp_path / "broker", free_port()
    broker = f"127.0.0.1:{port}"
    processes.anabranch(
        "cloud",
        *("cloud", "--state", state, "--student", tiny_student, "--broker", broker),
        *("--grpc", "127.0.0.1:0", "--enrolment", "127.0.0.1:0", "--metrics", "127.0.0.1:0"),
        *("--tls-name", "127.0.0.1", "--broker-folder", folder, "--threads", "1"),
    )
    eventually((state / "cloud.json").exists)
    note = json.loads((state / "cloud.json").read_text())
    config = tmp_path / "mosquitto.conf"
    config.write_text(
        CONFIG.read_text()
        .replace("listener 8883", f"listener {port} 127.0.0.1")
        .replace("/var/lib/anabranch-broker", str(folder))
        + "user root\n"
    )
    processes.start("mosquitto", str(MOSQUITTO), "-c", config)

    told = dict(
        line.split() for line in run("device", "add", "kitchen-1", "--state", state).splitlines()
    )
    assert run("device", "list", "--state", state).split("\t")[:3] == [
        "kitchen-1",
        "home",
        "invited",
    ]
    identity = tmp_path / "kitchen-1" / "identity"
    said = run(
        *("device", "enroll", "--identity", identity, "--cloud", note["enrolment"]),
        *("--ca", told["ca"], "--token", told["token"]),
    )
    assert "device  kitchen-1" in said
    assert "\tenrolled\t" in run("device", "list", "--state", state)

    device = tmp_path / "kitchen-1" / "state"
    processes.anabranch(
        "edge",
        *("edge", "--state", device, "--identity", identity, "--broker", broker),
        *("--cloud", note["grpc"], "--trust", state / "tuf" / "root.json"),
        *("--student", tiny_student / "bundle", "--listen", "127.0.0.1:0"),
        *("--metrics", "127.0.0.1:0", "--threads", "1"),
    )
    eventually((device / "agent.json").exists)
    agent = json.loads((device / "agent.json").read_text())
    assert agent["device"] == "kitchen-1"

    def metric(name: str, where: str = note["metrics"]) -> float:
        lines = httpx.get(where).text.splitlines()
        return next((float(n.split()[1]) for n in lines if n.startswith(name)), 0.0)

    eventually(lambda: httpx.get(f"{agent['api']}/healthz").json()["broker_connected"])
    eventually(lambda: metric('anabranch_devices_online{channel="home"}') == 1)
    eventually(lambda: metric('anabranch_watch_streams{channel="home"}') == 1)
    assert metric("anabranch_devices_certified") == 1
    assert metric("anabranch_certificate_expires_timestamp_seconds", agent["metrics"]) > 1.7e9

    assert "1 certificates revoked" in run(
        "device", "revoke", "kitchen-1", "--state", state, "--reason", "sold"
    )
    eventually(lambda: "was revoked (sold)" in processes.log("edge"))
    eventually(lambda: metric('anabranch_watch_streams{channel="home"}') == 0)
    assert "\trevoked\t" in run("device", "list", "--state", state)
