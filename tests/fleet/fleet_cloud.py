"""Store, driver and service on one state folder, and a client that talks to them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import grpc
import numpy as np
import pytest
from grpc import aio
from prometheus_client import CollectorRegistry

from cloud.db import open_database, read
from cloud.fleet.service import FleetService, serve
from cloud.releases.store import ReleaseStore
from cloud.releases.tables import ReleaseRow
from cloud.rollout.driver import RolloutDriver
from cloud.rollout.plan import Plan
from protos import grpc_options
from protos.harness import Harness
from protos.v1 import fleet_pb2, fleet_pb2_grpc, release_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable
    from pathlib import Path

    from cloud.releases.store import Release

    Talk = Callable[[fleet_pb2_grpc.FleetAsyncStub], Awaitable[None]]

T = TypeVar("T")
WEIGHTS = np.random.default_rng(0).integers(0, 255, 17 << 20, dtype=np.uint8)
CHUNK = grpc_options.MAX_CHUNK_BYTES


class Cloud:
    """Store, driver and service on one state folder; ``run`` lets a client talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = CollectorRegistry()
        self.engine = open_database(folder / "cloud.db")
        self.store = ReleaseStore(
            folder=folder,
            engine=self.engine,
            clock=lambda: 1e9,
            registry=self.registry,
        )
        self.driver = RolloutDriver(
            engine=self.engine, clock=lambda: 1e9, registry=self.registry, plan=Plan()
        )
        self.service = FleetService(store=self.store, driver=self.driver, registry=self.registry)
        self.address = ""

    def publish(self, changed: int = 0) -> Release:
        bundle = self.folder / f"bundle-{changed}"
        bundle.mkdir()
        weights = WEIGHTS.copy()
        weights[:changed] += 1
        (bundle / "weights.bin").write_bytes(weights.tobytes())
        for name in ("graph.onnx", "tokenizer.json", "student.json"):
            (bundle / name).write_bytes(name.encode())
        (bundle / "graph.onnx").write_bytes(b"")
        (bundle / "harness.json").write_bytes(Harness().to_json())
        return self.store.publish(
            bundle, channel="home", canaries=[], bounds=release_pb2.ProbeBounds()
        )

    def manifest(self, version: int) -> str:
        """SHA-256 of a release's manifest."""
        with read(self.engine) as session:
            return str(session.get_one(ReleaseRow, ("home", version)).manifest)

    def begin(self, release: Release) -> None:
        self.driver.begin("home", release.version, student=release.student)

    def run(self, talk: Talk) -> None:
        async def scenario() -> None:
            server, port = await serve(self.service, listen="127.0.0.1:0")
            self.address = f"127.0.0.1:{port}"
            try:
                async with aio.insecure_channel(
                    self.address, options=grpc_options.CLIENT
                ) as channel:
                    await asyncio.wait_for(talk(fleet_pb2_grpc.FleetStub(channel)), 60)
            finally:
                await server.stop(None)
                await self.service.drain()

        asyncio.run(scenario())

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"channel": "home", **labels})


def file(release: Release, name: str = "weights.bin") -> release_pb2.File:
    return next(f for f in release.manifest.files if f.name == name)


def watch_request(device: str = "hall", **fields: object) -> fleet_pb2.WatchRequest:
    given = {"channel": "home", "device": device, "student": "aa" * 32, "release": 0, **fields}
    return fleet_pb2.WatchRequest(**given)  # type: ignore[arg-type] # also malformed ones


def report(device: str, release: Release, sequence: int = 1) -> fleet_pb2.UpdateReport:
    return fleet_pb2.UpdateReport(
        channel="home",
        device=device,
        release=release.version,
        state=fleet_pb2.UPDATE_STATE_COMMITTED,
        student=release.student,
        sequence=sequence,
    )


async def all_of(stream: AsyncIterable[T]) -> list[T]:
    return [item async for item in stream]


async def fails(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 30)
    return caught.value.code(), caught.value.details() or ""


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the condition is in another thread's hands
            await asyncio.sleep(0.005)
