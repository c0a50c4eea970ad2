"""A cloud with TLS on real sockets, in a thread of its own, and devices that enrol with it."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Self

from prometheus_client import CollectorRegistry

from cloud.db import open_database
from cloud.fleet.service import FleetService, serve
from cloud.identity.access import FleetLimits
from cloud.identity.security import Security, TlsConfig, open_registry
from cloud.identity.service import serve_enrolment
from cloud.releases.store import ReleaseStore
from cloud.rollout.driver import RolloutDriver
from cloud.rollout.plan import Plan
from edge.identity.enroll import enroll
from edge.identity.renew import channel_credentials
from edge.update.grpc_transport import GrpcTransport
from protos.harness import Harness
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from pathlib import Path

    from cloud.releases.store import Release
    from edge.identity.files import Identity

BIG = 1 << 20
STUDENT = "aa" * 32


def timestamp_of(transport: GrpcTransport) -> bytes:
    """Any call that a device makes to the fleet service."""
    return b"".join(piece.data for piece in transport.read_metadata("timestamp.json"))


class Clock:
    """The time of day, and as much later as a test says."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Cloud:
    """Register, fleet service and enrolment; use it in a ``with`` block."""

    def __init__(
        self, folder: Path, *, limits: FleetLimits | None = None, life_s: float = 3600.0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.clock = Clock()
        self.metrics = CollectorRegistry()
        self.engine = open_database(folder / "cloud.sqlite")
        self.registry = open_registry(folder, self.engine, clock=self.clock, life_s=life_s)
        self.ca = (folder / "identity" / "ca.pem").read_bytes()
        self.config = TlsConfig(
            hosts=("127.0.0.1", "localhost"),
            enrolment="127.0.0.1:0",
            broker_folder=folder / "broker",
            device_life_s=life_s,
            limits=limits or FleetLimits(),
        )
        self.security = Security(
            state=folder,
            config=self.config,
            engine=self.engine,
            clock=self.clock,
            registry=self.metrics,
        )
        self.store = ReleaseStore(
            folder=folder,
            engine=self.engine,
            clock=time.time,
            registry=self.metrics,
        )
        self.driver = RolloutDriver(
            engine=self.engine, clock=time.time, registry=self.metrics, plan=Plan()
        )
        self.service = FleetService(
            store=self.store,
            driver=self.driver,
            registry=self.metrics,
            access=self.security.access,
        )
        self.grpc = self.enrolment = ""
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._started: Future[None] = Future()

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.result(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()
        self.engine.dispose()

    async def _run(self) -> None:
        security = self.security
        security.look()
        server, port = await serve(
            self.service,
            listen="127.0.0.1:0",
            credentials=security.server.credentials(mutual=True),
            also=[security.serve_renewal],
        )
        desk, desk_port = await serve_enrolment(
            security.enrolment,
            listen="127.0.0.1:0",
            credentials=security.server.credentials(mutual=False),
        )
        looking = asyncio.create_task(security.keep_looking())
        self.grpc, self.enrolment = f"127.0.0.1:{port}", f"127.0.0.1:{desk_port}"
        self._started.set_result(None)
        await self._ended.wait()
        looking.cancel()
        await desk.stop(None)
        await server.stop(None)
        await self.service.drain()

    def token(self, device: str = "lamp-1", *, channel: str = "home", life_s: float = 60) -> str:
        self.registry.add(device, channel=channel)
        return self.registry.invite(device, life_s=life_s)

    def enrolled(self, device: str = "lamp-1", *, channel: str = "home") -> Identity:
        identity, _ = enroll(
            self.folder / "devices" / device,
            cloud=self.enrolment,
            token=self.token(device, channel=channel),
            authorities=self.ca,
        )
        return identity

    def transport(self, identity: Identity, *, channel: str = "home") -> GrpcTransport:
        return GrpcTransport(
            address=self.grpc,
            channel=channel,
            device=identity.device,
            credentials=channel_credentials(identity),
        )

    def publish(self, channel: str = "home") -> Release:
        bundle = self.folder / f"bundle-{channel}"
        bundle.mkdir()
        (bundle / "weights.bin").write_bytes(bytes(BIG))
        for name in ("graph.onnx", "tokenizer.json", "student.json"):
            (bundle / name).write_bytes(name.encode())
        (bundle / "harness.json").write_bytes(Harness().to_json())
        release = self.store.publish(
            bundle, channel=channel, canaries=[], bounds=release_pb2.ProbeBounds()
        )
        self.driver.begin(channel, release.version, student=release.student)
        return release

    def refused(self, reason: str) -> float:
        name = "anabranch_fleet_refused_total"
        return self.metrics.get_sample_value(name, {"reason": reason}) or 0

    def requests(self, result: str) -> float:
        name = "anabranch_certificate_requests_total"
        return self.metrics.get_sample_value(name, {"result": result}) or 0
