"""The demo's town: broker, cloud and devices as processes, and the people of three homes."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from cloud.demo.people import Asked, Household
from cloud.demo.processes import DemoError, Processes, free_address
from cloud.jobs import Jobs
from edge.student.bundle import WEIGHTS, digest
from edge.update.grpc_transport import GrpcTransport
from edge.update.manifest import parse
from edge.update.trust import TufReleases, load_root

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloud.demo.commands import Command
    from cloud.demo.homes import Home
    from cloud.demo.record import Record
    from cloud.jobs import Job
    from protos.v1 import release_pb2

CHANNEL = "home"
_WATCH_S = 0.5


@dataclass(frozen=True)
class Settings:
    """How the demo starts the parts. ``options`` go to ``anabranch cloud`` as they are."""

    student: Path
    threads: int
    options: Sequence[str]


class Town:
    """Starts everything, asks, watches.

    Args:
        folder: state of all processes, and their logs; empty before.
        homes: each gets a device.
        settings: how to start.
        record: where what happens is written down.
    """

    def __init__(
        self, folder: Path, homes: Sequence[Home], settings: Settings, record: Record
    ) -> None:
        self.processes = Processes(folder / "logs")
        self.households = [Household(h, folder / f"home-{h.name.lower()}") for h in homes]
        self.jobs = Jobs(folder / "cloud" / "jobs")
        self.phase = ""
        self._folder = folder
        self._settings = settings
        self._record = record
        self._asked: dict[str, int] = {}
        self._alarms: dict[str, int] = {}
        self._releases: dict[str, int] = {}
        self._fleet = ""

    async def start(self) -> None:
        """Start broker, cloud and devices, and wait until every device runs release 1.

        Raises:
            DemoError: one did not start.
        """
        broker, fleet = free_address(), free_address()
        settings, cloud = self._settings, self._folder / "cloud"
        self.processes.start(
            "broker", "broker", "--listen", broker, "--state", str(self._folder / "broker")
        )
        await self.processes.listening("broker", broker)
        self.processes.start(
            *("cloud", "cloud", "--state", str(cloud), "--student", str(settings.student)),
            *("--channel", CHANNEL, "--broker", broker, "--grpc", fleet),
            *("--metrics", "127.0.0.1:0", *settings.options),
        )
        await self.processes.note("cloud", cloud / "cloud.json")
        for household in self.households:
            self.processes.start(
                *(household.device, "edge", "--state", str(household.state)),
                *("--device", household.device, "--channel", CHANNEL),
                *("--student", str(settings.student / "bundle")),
                *("--trust", str(cloud / "tuf" / "root.json")),
                *("--broker", broker, "--cloud", fleet),
                *("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"),
                *("--threads", str(settings.threads)),
            )
        for household in self.households:
            file = household.state / "agent.json"
            household.connect((await self.processes.note(household.device, file))["api"])
        self._fleet = fleet
        await self.settle(1)

    async def stop_clients(self) -> None:
        """Close what the demo itself holds open."""
        for household in self.households:
            await household.close()

    def begin(self, phase: str) -> None:
        """From now on what happens belongs to this phase."""
        self.phase = phase
        self._asked.clear()
        self._record.add("phase", name=phase)

    async def say(self, household: Household, command: Command, skill: str) -> Asked | None:
        """Let people ask, judge the answer, and look at the device."""
        asked = await household.ask(command)
        self._asked[household.device] = self._asked.get(household.device, 0) + 1
        if asked is not None:
            self._record.add(
                "ask",
                device=household.device,
                phase=self.phase,
                skill=skill,
                right=asked.right,
                seconds=round(asked.seconds, 3),
                release=self._releases.get(household.device, 0),
            )
            await household.judge(asked)
        await self.look(household)
        return asked

    async def look(self, household: Household) -> None:
        """Note what changed on a device since it was last looked at."""
        try:
            health = await household.health()
        except httpx.HTTPError:
            self.processes.check()
            return
        device, alarms = household.device, int(health["drift"]["alarms"])
        if alarms > self._alarms.get(device, 0):
            self._record.add(
                "alarm", device=device, phase=self.phase, commands=self._asked.get(device, 0)
            )
        self._alarms[device] = alarms
        release = int(health["release"])
        if release > self._releases.get(device, 0):
            self._record.add("swap", device=device, release=release)
        self._releases[device] = release

    async def settle(self, version: int) -> None:
        """Wait until every device serves a release.

        Raises:
            DemoError: one does not get there.
        """

        async def behind() -> bool:
            for household in self.households:
                await self.look(household)
            return any(self._releases.get(h.device, 0) < version for h in self.households)

        for _ in range(1200):
            if not await behind():
                return
            self.processes.check()
            await asyncio.sleep(_WATCH_S)
        msg = f"release {version} did not reach every device: {self._releases}"
        raise DemoError(msg)

    def job(self, number: int) -> Job | None:
        """The adaptation with this number, once the cloud has begun it."""
        jobs = self.jobs.all()
        return jobs[number - 1] if len(jobs) >= number else None

    def released(self, job: Job) -> int | None:
        """The release made of a job, once there is one.

        Raises:
            DemoError: the job failed, or its gate refused the candidate.
        """
        result = job.result
        if result is not None and not result["passed"]:
            log = job.folder / "log.txt"
            why = result.get("error") or json.dumps(result["checks"], indent=1)
            msg = f"adaptation {job.name} made no release: {why}\nIts log: {log}"
            raise DemoError(msg)
        return job.version

    async def manifest(self, version: int) -> release_pb2.Manifest:
        """A release's manifest, as devices get it and believe it."""
        cloud, kept = self._folder / "cloud", self._folder / "trust"
        return await asyncio.to_thread(believed, self._fleet, version, cloud=cloud, kept=kept)

    def serving(self, household: Household) -> Path:
        """The bundle that a device serves now: its slot."""
        pointer = household.state / "slots" / "pointer.json"
        current: dict[str, Any] = json.loads(pointer.read_text())["current"]
        return household.state / "slots" / str(current["student"])

    def digests(self) -> dict[str, str]:
        """Digest of the files that each device serves, computed anew from the disk."""
        return {h.device: digest(self.serving(h)) for h in self.households}


def delta_bytes(manifest: release_pb2.Manifest, before: release_pb2.Manifest) -> int:
    """Bytes of the delta that takes a device from one release to the next.

    Raises:
        DemoError: there is none.
    """
    weights = next(f.sha256 for f in before.files if f.name == WEIGHTS)
    for delta in manifest.deltas:
        if delta.base_sha256 == weights:
            return int(delta.size)
    msg = f"release {manifest.version} has no delta from release {before.version}"
    raise DemoError(msg)


def believed(fleet: str, version: int, *, cloud: Path, kept: Path) -> release_pb2.Manifest:
    """A release's manifest, as a device gets it and believes it.

    Args:
        fleet: the fleet service, ``host:port``.
        version: the release.
        cloud: the cloud's state folder, for its root.
        kept: folder of what was believed last.

    Raises:
        AnabranchError: see :class:`~edge.update.trust.TufReleases`.
    """
    transport = GrpcTransport(address=fleet, channel=CHANNEL, device="nobody")
    try:
        releases = TufReleases(
            root=load_root(cloud / "tuf" / "root.json"),
            folder=kept,
            channel=CHANNEL,
            transport=transport,
            clock=time.time,
        )
        return parse(releases.manifest(version), channel=CHANNEL, release=version)
    finally:
        transport.close()
