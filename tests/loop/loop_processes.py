"""A town of real processes (broker, cloud, devices), and people who talk to its devices.

Run as a script it is the cloud: ``loop_processes.py '{"state": ..., "student": ...}'``, the options
as JSON. It differs from ``anabranch cloud`` in the gate's bounds alone: a random student learns
nothing, so whatever it has become must pass.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
from prometheus_client import CollectorRegistry

from cloud.curator import CuratorConfig
from cloud.db import opened
from cloud.demo.town import believed
from cloud.evidence.store import EvidenceStore
from cloud.gate.gate import GateConfig
from cloud.jobs import Jobs
from cloud.learners.config import LearnerConfig
from cloud.policy import PolicyConfig
from cloud.releases.repository import Repository
from cloud.service import CloudConfig, run
from edge.process import PARENT, end_with_parent
from protos.errors import AnabranchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud.jobs import Job
    from protos.v1 import release_pb2

Json = dict[str, Any]
CHANNEL = "home"
_DEADLINE_S = 600
_POLL_S = 0.05
_LULL_S = 0.2  # between requests that only see whether they are answered
_NEVER = 100_000


class Device:
    """One device's process as seen from outside."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.state = folder / name
        self.told: list[str] = []
        """Ids of the demonstrations that it said it keeps."""

    @property
    def api(self) -> str:
        note: Json = json.loads((self.state / "agent.json").read_text())
        return str(note["api"])

    def health(self) -> Json:
        body: Json = httpx.get(f"{self.api}/healthz", timeout=_DEADLINE_S).json()
        return body

    def ask(self, text: str) -> Json:
        body = {"messages": [{"role": "user", "content": text}]}
        return self._post("chat/completions", body)

    def correct(self, text: str, right: str) -> None:
        answer = self.ask(text)
        body = {"completion_id": answer["id"], "correction": right}
        self.told.append(str(self._post("feedback", body)["demonstration_id"]))

    def _post(self, path: str, body: Json) -> Json:
        response = httpx.post(f"{self.api}/v1/{path}", json=body, timeout=_DEADLINE_S)
        response.raise_for_status()
        found: Json = response.json()
        return found


class Town:
    """Broker, cloud and devices in one folder; leaving the context kills them all.

    Args:
        folder: state and logs of everything.
        student: an imported student.
        free_port: gives ports.
        devices: how many.
        demonstrations: what an adaptation needs; without it none begins.
    """

    def __init__(
        self,
        folder: Path,
        student: Path,
        free_port: Callable[[], int],
        *,
        devices: int,
        demonstrations: int = _NEVER,
    ) -> None:
        self.folder = folder
        self.cloud_state = folder / "cloud"
        self.devices = [Device(f"device-{i}", folder) for i in range(devices)]
        self.jobs = Jobs(self.cloud_state / "jobs")
        self.fleet = f"127.0.0.1:{free_port()}"
        self._broker = f"127.0.0.1:{free_port()}"
        self._student = student
        self._options: Json = {
            "state": str(self.cloud_state),
            "student": str(student),
            "broker": self._broker,
            "grpc": self.fleet,
            "demonstrations": demonstrations,
        }
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        """Start everything, and wait until each device runs the first release."""
        # So that devices need not wait for the cloud.
        Repository(state=self.cloud_state, clock=time.time, registry=CollectorRegistry())
        try:
            for name in ("broker", "cloud", *(d.name for d in self.devices)):
                self.start(name)
            self.until(lambda: all(self.release_of(d) == 1 for d in self.devices))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.running):
            self.kill(name)

    def start(self, name: str) -> None:
        """Start ``broker``, ``cloud`` or a device; what it says goes into ``NAME.log``."""
        if name == "broker":
            command = ["-m", "cloud.cli", "broker", "--listen", self._broker]
            command += ["--state", str(self.folder / "broker")]
        elif name == "cloud":
            (self.cloud_state / "cloud.json").unlink(missing_ok=True)
            command = [__file__, json.dumps(self._options)]
        else:
            (self.folder / name / "agent.json").unlink(missing_ok=True)
            command = ["-m", "cloud.cli", "edge", "--state", str(self.folder / name)]
            command += ["--device", name, "--channel", CHANNEL, "--threads", "1"]
            command += ["--student", str(self._student / "bundle")]
            command += ["--trust", str(self.cloud_state / "tuf" / "root.json")]
            command += ["--broker", self._broker, "--cloud", self.fleet]
            command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=log,
                env=os.environ | {PARENT: str(os.getpid())},
            )

    def kill(self, name: str) -> None:
        """SIGKILL: what a power cut is to a process."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds, while every process runs."""
        end = time.monotonic() + _DEADLINE_S
        while not condition():
            for name, process in self.running.items():
                assert process.poll() is None, f"{name} ended by itself: {self.log(name)}"
            assert time.monotonic() < end, {name: self.log(name) for name in self.running}
            time.sleep(_POLL_S)

    def log(self, name: str) -> str:
        """The end of what a process said."""
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def release_of(self, device: Device) -> int:
        """The release that a device serves; -1 while it does not answer."""
        with suppress(OSError, httpx.HTTPError):
            return int(device.health()["release"])
        return -1

    def settled(self, version: int) -> bool:
        """Whether every device serves a release, and has nothing left to send."""
        with suppress(OSError, httpx.HTTPError):
            found = [d.health() for d in self.devices]
            return all(h["release"] == version and not h["outbox"]["waiting"] for h in found)
        return False

    def job(self) -> Job | None:
        """The first adaptation, once there is one."""
        jobs = self.jobs.all()
        return jobs[0] if jobs else None

    def released(self) -> int | None:
        """The release that was made of the first adaptation, once there is one."""
        job = self.job()
        return None if job is None else job.version

    def learning(self) -> bool:
        """Whether the first adaptation is at work, and not just decided on."""
        job = self.job()
        return job is not None and job.progress is not None

    def newest(self) -> int:
        """The newest release that there is, published or not yet rolled out."""
        with closing(sqlite3.connect(self.cloud_state / "cloud.sqlite")) as db:
            (version,) = db.execute("SELECT max(version) FROM manifests").fetchone()
        return int(version)

    def manifest(self, version: int) -> release_pb2.Manifest:
        """A release's manifest, as devices get it."""
        return believed(self.fleet, version, cloud=self.cloud_state, kept=self.folder / "trust")

    def stored(self) -> list[str]:
        """Ids of all demonstrations that the cloud has stored."""
        with opened(self.cloud_state / "cloud.sqlite") as engine:
            rows = EvidenceStore(engine, clock=time.time).demonstrations(CHANNEL)
        return [d.id for d in rows]

    def metric(self, name: str) -> float:
        """A sample of the cloud's metrics; 0 where there is none."""
        note: Json = json.loads((self.cloud_state / "cloud.json").read_text())
        lines = httpx.get(note["metrics"], timeout=_DEADLINE_S).text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)


class People:
    """Somebody at each device who asks all the time, and corrects every answer until told not to.

    Attributes:
        correcting: whether they do.
        failures: requests that were not answered, each beginning with the device's name.
    """

    def __init__(self, town: Town) -> None:
        self.correcting = True
        self.failures: list[str] = []
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._talk, args=(d,)) for d in town.devices]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _talk(self, device: Device) -> None:
        number = 0
        while not self._done.is_set():
            number += 1
            text = f"{device.name} wants {number}"
            try:
                if self.correcting:
                    device.correct(text, f'{{"n":{number}}}')
                else:
                    device.ask(text)
                    time.sleep(_LULL_S)
            except (OSError, httpx.HTTPError, ValueError) as error:
                self.failures.append(f"{device.name}: {error!r}")
                time.sleep(_POLL_S)


def cloud_config(options: Json) -> CloudConfig:
    """The cloud's options out of JSON."""
    gate = GateConfig(new_share=0.0, new_gain=-1.0, earlier_loss=1.0, base_kl=1e9, threads=1)
    return CloudConfig(
        state=Path(options["state"]),
        channel=CHANNEL,
        student=Path(options["student"]),
        broker=options["broker"],
        grpc=options["grpc"],
        metrics="127.0.0.1:0",
        curator=CuratorConfig(
            policy=PolicyConfig(demonstrations=options["demonstrations"]),
            learner=LearnerConfig(steps=4),
            gate=gate,
            threads=1,
        ),
    )


if __name__ == "__main__":
    end_with_parent()
    try:
        run(cloud_config(json.loads(sys.argv[1])))
    except AnabranchError as error:
        sys.exit(f"{type(error).__name__}: {error}")
