"""The server under test: store, rollout driver and fleet service, as the cloud's process runs them.

Started by :mod:`bench.fleet`. Orders come as JSON lines on standard input, answers go to standard
output. Beside the service listens a second one that sends chunks out of memory: it is what gRPC
itself can do on this machine.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from grpc import aio
from prometheus_client import CollectorRegistry

from cloud.db import open_database
from cloud.fleet.service import FleetService, serve
from cloud.releases.store import ReleaseStore
from cloud.rollout.driver import RolloutDriver
from cloud.rollout.plan import REST, Plan
from edge.student.bundle import WEIGHTS
from protos.grpc_options import MAX_CHUNK_BYTES, SERVER
from protos.harness import Harness
from protos.v1 import fleet_pb2, fleet_pb2_grpc, release_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHANNEL = "home"
_WEIGHTS_BYTES = 24_000_000
_TICK_S = 1.0


class FromMemory(FleetService):
    """Answers reads at once: no disk, no database, no thread."""

    def __init__(self, **rooms: Any) -> None:  # noqa: ANN401 - the service's
        super().__init__(**rooms)
        self._chunk = secrets.token_bytes(MAX_CHUNK_BYTES)

    async def Read(  # noqa: N802 - the name is the protocol's
        self,
        request: fleet_pb2.ReadRequest,
        context: aio.ServicerContext[fleet_pb2.ReadRequest, fleet_pb2.Chunk],
    ) -> AsyncIterator[fleet_pb2.Chunk]:
        """As many bytes as were asked for."""
        del context
        offset, end = request.offset, request.length
        while offset < end:
            data = self._chunk[: end - offset]
            yield fleet_pb2.Chunk(offset=offset, data=data, size=end)
            offset += len(data)


def publish(store: ReleaseStore, folder: Path, delta_bytes: int) -> list[dict[str, Any]]:
    """Two releases; of the second, ``delta_bytes`` of the weights are new, and do not compress."""
    dice = np.random.default_rng(0)
    weights = dice.integers(0, 255, _WEIGHTS_BYTES, dtype=np.uint8)
    notes = []
    for number in range(2):
        bundle = folder / f"bundle-{number}"
        bundle.mkdir()
        weights[: number * delta_bytes] = dice.integers(0, 255, number * delta_bytes)
        (bundle / WEIGHTS).write_bytes(weights.tobytes())
        for name in ("graph.onnx", "tokenizer.json", "student.json"):
            (bundle / name).write_bytes(name.encode())
        (bundle / "harness.json").write_bytes(Harness().to_json())
        made = store.publish(bundle, channel=CHANNEL, canaries=[], bounds=release_pb2.ProbeBounds())
        note: dict[str, Any] = {"version": made.version, "student": made.student}
        note |= {"deltas": [[d.sha256, d.size] for d in made.manifest.deltas]}
        notes.append(note)
    return notes


async def run(folder: Path, delta_bytes: int) -> None:
    """Serve until standard input ends."""
    registry = CollectorRegistry()
    engine = open_database(folder / "cloud.sqlite")
    store = ReleaseStore(
        folder=folder,
        engine=engine,
        clock=time.time,
        registry=registry,
    )
    releases = publish(store, folder, delta_bytes)
    plan = Plan(waves=(REST,))
    driver = RolloutDriver(engine=engine, clock=time.time, registry=registry, plan=plan)
    driver.begin(CHANNEL, releases[0]["version"], student=releases[0]["student"])
    service = FleetService(store=store, driver=driver, registry=registry)
    server, port = await serve(service, listen="127.0.0.1:0")
    plain = aio.server(options=SERVER)
    memory = FromMemory(store=store, driver=driver, registry=CollectorRegistry())
    fleet_pb2_grpc.add_FleetServicer_to_server(memory, plain)
    plain_port = plain.add_insecure_port("127.0.0.1:0")
    await plain.start()
    say(address=f"127.0.0.1:{port}", plain=f"127.0.0.1:{plain_port}", releases=releases)
    ticking = asyncio.create_task(_tick(driver))
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        began = time.monotonic()
        await asyncio.to_thread(driver.begin, CHANNEL, order["version"], student=order["student"])
        say(at=began, stored_s=time.monotonic() - began)
    ticking.cancel()
    await asyncio.gather(server.stop(0), plain.stop(0))
    await service.drain()


async def _tick(driver: RolloutDriver) -> None:
    while True:
        await asyncio.to_thread(driver.tick)
        await asyncio.sleep(_TICK_S)


def say(**what: object) -> None:
    """One line to who started this process."""
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), int(sys.argv[2])))
