"""A cloud without learning: the real store, rollouts and fleet service, in a process of its own.

    sockets_cloud.py FOLDER plain|mtls

It prints one JSON object a line: first its port, the file that devices trust and how to enrol the
device; then, for each line of JSON on its standard input that names a bundle and a canary, the
release that it made.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from protos import grpc_options
from protos.v1 import device_pb2, release_pb2

if TYPE_CHECKING:
    from cloud.releases.store import ReleaseStore
    from cloud.rollout.driver import RolloutDriver

CHANNEL, DEVICE = "home", "kitchen"
_TICK_S = 0.1
HASTE = {"grpc.http2.min_ping_interval_without_data_ms": 100}  # fits sockets_agent.py
grpc_options.SERVER = tuple({**dict(grpc_options.SERVER), **HASTE}.items())  # type: ignore[misc]


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)  # noqa: T201 # its one way to talk


def publish(store: ReleaseStore, driver: RolloutDriver, order: dict[str, Any]) -> None:
    """Make a bundle the channel's release, and begin its rollout."""
    before = store.latest(CHANNEL)
    had = {f.sha256 for f in before.manifest.files} if before else set(order["provisioned"])
    canary = release_pb2.Canary(
        messages=[device_pb2.ChatMessage(role="user", content=order["prompt"])],
        answer=order["answer"],
    )
    release = store.publish(
        Path(order["bundle"]),
        channel=CHANNEL,
        canaries=[canary],
        bounds=release_pb2.ProbeBounds(min_equal_share=1.0),
    )
    driver.begin(CHANNEL, release.version, student=release.student)
    deltas = {d.target_sha256: d.size for d in release.manifest.deltas if d.base_sha256 in had}
    needed = [f for f in release.manifest.files if f.sha256 not in had]
    say(
        version=release.version,
        student=release.student,
        bytes=sum(min(f.size, deltas.get(f.sha256, f.size)) for f in needed),
    )


async def run(folder: Path, *, tls: bool) -> None:
    """Serve until the standard input ends."""
    from cloud.db import open_database
    from cloud.fleet.service import FleetService, serve
    from cloud.identity.security import Security, TlsConfig, open_registry
    from cloud.identity.service import serve_enrolment
    from cloud.releases.store import ReleaseStore
    from cloud.rollout.driver import RolloutDriver

    registry = CollectorRegistry()
    engine = open_database(folder / "cloud.sqlite")
    store = ReleaseStore(
        folder=folder,
        engine=engine,
        clock=time.time,
        registry=registry,
    )
    driver = RolloutDriver(engine=engine, clock=time.time, registry=registry)
    security, desk, enrolment = None, None, {}
    if tls:
        config = TlsConfig(hosts=("127.0.0.1",), enrolment="127.0.0.1:0")
        security = Security(
            state=folder, config=config, engine=engine, clock=time.time, registry=registry
        )
        security.look()
        register = open_registry(folder, engine, clock=time.time)
        register.add(DEVICE, channel=CHANNEL)
        desk, at = await serve_enrolment(
            security.enrolment,
            listen=config.enrolment,
            credentials=security.server.credentials(mutual=False),
        )
        enrolment = {
            "token": register.invite(DEVICE),
            "enrolment": f"127.0.0.1:{at}",
            "ca": str(folder / "identity" / "ca.pem"),
        }
    access = security.access if security is not None else None
    service = FleetService(store=store, driver=driver, registry=registry, access=access)
    server, port = await serve(
        service,
        listen="127.0.0.1:0",
        credentials=security.server.credentials(mutual=True) if security is not None else None,
    )
    say(port=port, trust=str(folder / "tuf" / "root.json"), **enrolment)

    async def tick() -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            await asyncio.to_thread(driver.tick)

    ticking = asyncio.create_task(tick())
    while line := await asyncio.to_thread(sys.stdin.readline):
        await asyncio.to_thread(publish, store, driver, json.loads(line))
    ticking.cancel()
    if desk is not None:
        await desk.stop(None)
    await server.stop(None)
    await service.drain()


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), tls=sys.argv[2] == "mtls"))
