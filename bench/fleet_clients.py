"""What asks the server in :mod:`bench.fleet`: devices with a connection each, and a health checker.

Each role is a process of its own; orders come as JSON lines on standard input, answers go to
standard output. Times are of the monotonic clock, which processes of one machine share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.fleet_server import CHANNEL, say
from protos import grpc_options
from protos.v1 import fleet_pb2, fleet_pb2_grpc

CHECK_EVERY_S = 0.05
_OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)


def connect(address: str) -> aio.Channel:
    """A connection that no other channel of this process shares."""
    return aio.insecure_channel(address, options=(*grpc_options.CLIENT, _OWN_CONNECTION))


class Devices:
    """Devices that watch, and fetch when they are told to."""

    def __init__(self, address: str, names: list[str], student: str, release: int) -> None:
        self._names = names
        self._serving = (student, release)
        self._channels = {name: connect(address) for name in names}
        self._heard: dict[int, list[float]] = {}
        self._sequence = 0

    async def watch_all(self) -> None:
        """Open every stream; says when all have heard, and again for each newer release."""
        async with asyncio.TaskGroup() as group:
            for name in self._names:
                group.create_task(self._watch(name))
                if len(self._heard.get(self._serving[1], ())) < len(self._names):
                    await asyncio.sleep(0)

    async def _watch(self, name: str) -> None:
        student, release = self._serving
        request = fleet_pb2.WatchRequest(
            channel=CHANNEL, device=name, student=student, release=release
        )
        stub = fleet_pb2_grpc.FleetStub(self._channels[name])
        async for target in stub.Watch(request, wait_for_ready=True):
            heard = self._heard.setdefault(target.release, [])
            heard.append(time.monotonic())
            if len(heard) == len(self._names):
                say(version=target.release, last=max(heard), first=min(heard))

    async def fetch(self, order: dict[str, Any]) -> None:
        """Some devices read a delta at once, and may report before and after as devices do."""
        plain = order.get("plain")
        channels = {
            name: connect(plain) if plain else self._channels[name]
            for name in self._names[: order["devices"]]
        }
        began = time.monotonic()
        times = await asyncio.gather(
            *(self._fetch(name, channel, order) for name, channel in channels.items())
        )
        say(
            fetched=order["size"] * len(times),
            seconds=time.monotonic() - began,
            slowest_s=max(times),
        )
        if plain:
            await asyncio.gather(*(channel.close() for channel in channels.values()))

    async def _fetch(self, name: str, channel: aio.Channel, order: dict[str, Any]) -> float:
        stub = fleet_pb2_grpc.FleetStub(channel)
        if order["reports"]:
            await self._report(stub, name, order, fleet_pb2.UPDATE_STATE_FETCHING)
        began = time.monotonic()
        size, offset = order["size"], 0
        while offset < size:
            request = fleet_pb2.ReadRequest(
                channel=CHANNEL, sha256=order["sha256"], offset=offset, length=size
            )
            async for chunk in stub.Read(request):
                offset += len(chunk.data)
        seconds = time.monotonic() - began
        if order["reports"]:
            await self._report(stub, name, order, fleet_pb2.UPDATE_STATE_COMMITTED)
        return seconds

    async def _report(
        self,
        stub: fleet_pb2_grpc.FleetAsyncStub,
        name: str,
        order: dict[str, Any],
        state: fleet_pb2.UpdateState.ValueType,
    ) -> None:
        self._sequence += 1
        committed = state == fleet_pb2.UPDATE_STATE_COMMITTED
        await stub.Report(
            fleet_pb2.UpdateReport(
                channel=CHANNEL,
                device=name,
                release=order["version"],
                state=state,
                student=order["student"] if committed else self._serving[0],
                sequence=self._sequence,
            )
        )


async def devices(options: dict[str, Any]) -> None:
    """Watch, and do what standard input asks for."""
    names = [f"device-{options['first'] + n}" for n in range(options["count"])]
    all_of_them = Devices(options["address"], names, options["student"], options["release"])
    watching = asyncio.create_task(all_of_them.watch_all())
    while line := await asyncio.to_thread(sys.stdin.readline):
        await all_of_them.fetch(json.loads(line))
    watching.cancel()


async def checker(options: dict[str, Any]) -> None:
    """Check health at a fixed pace, whether the one before was answered or not."""
    seen: list[tuple[float, float]] = []
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    async with connect(options["address"]) as channel, asyncio.TaskGroup() as group:
        stub = health_pb2_grpc.HealthStub(channel)

        async def check() -> None:
            began = time.monotonic()
            await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            seen.append((began, time.monotonic() - began))

        while not ended.done():
            group.create_task(check())
            await asyncio.sleep(CHECK_EVERY_S)
    say(checks=seen)


if __name__ == "__main__":
    role = {"devices": devices, "checker": checker}[sys.argv[1]]
    asyncio.run(role(json.loads(sys.argv[2])))
