"""The Fleet service over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc
import numpy as np
import pytest
from grpc import aio
from prometheus_client import CollectorRegistry

from cloud.db import open_database, write
from cloud.fleet.service import FleetService, serve
from cloud.releases.keys import open_keys
from cloud.releases.store import ReleaseStore
from cloud.releases.tables import ReleaseRow
from cloud.rollout.driver import RolloutDriver
from cloud.rollout.state import Health, Phase, Plan
from edge.update import trust
from protos import grpc_options
from protos.errors import UnavailableError
from protos.harness import Harness
from protos.v1 import fleet_pb2, fleet_pb2_grpc, release_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable

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
            signer=open_keys(folder / "keys"),
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

        asyncio.run(scenario())

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, {"channel": "home", **labels})


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


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


def test_the_manifest_is_what_devices_believe(cloud: Cloud, tmp_path: Path) -> None:
    release = cloud.publish()

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        reply = await stub.GetManifest(fleet_pb2.ManifestRequest(channel="home", release=1))
        keys = trust.load_trusted(tmp_path / "keys" / "trusted.pem")
        manifest = trust.verify(reply.signed_manifest, keys=keys, channel="home", now_ms=0)
        assert manifest == release.manifest

    cloud.run(talk)


def test_a_file_is_read_in_bounded_pieces_and_resumed_at_an_offset(cloud: Cloud) -> None:
    release = cloud.publish()
    data = WEIGHTS.tobytes()
    sha256 = file(release).sha256

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        request = fleet_pb2.ReadRequest(channel="home", sha256=sha256)
        chunks = await all_of(stub.Read(request))
        assert {chunk.size for chunk in chunks} == {len(data)}
        assert max(len(chunk.data) for chunk in chunks) == CHUNK
        got = b"".join(chunk.data for chunk in chunks)
        assert len(got) == grpc_options.MAX_READ_BYTES
        request.offset = len(got)
        chunks = await all_of(stub.Read(request))
        assert chunks[0].offset == len(got)
        got += b"".join(chunk.data for chunk in chunks)
        assert hashlib.sha256(got).hexdigest() == sha256
        assert cloud.value("anabranch_served_bytes_total", kind="file") == len(data)

    cloud.run(talk)


def test_a_range_is_cut_at_the_end_and_refused_past_it(cloud: Cloud) -> None:
    release = cloud.publish()
    weights, empty = file(release), file(release, "graph.onnx")

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        def read(sha256: str, offset: int, length: int) -> AsyncIterable[fleet_pb2.Chunk]:
            return stub.Read(
                fleet_pb2.ReadRequest(channel="home", sha256=sha256, offset=offset, length=length)
            )

        (chunk,) = await all_of(read(weights.sha256, weights.size - 3, 100))
        assert chunk.data == WEIGHTS[-3:].tobytes()
        (chunk,) = await all_of(read(weights.sha256, 5, 7))
        assert (chunk.offset, chunk.data) == (5, WEIGHTS[5:12].tobytes())
        (chunk,) = await all_of(read(weights.sha256, weights.size, 10))
        assert (chunk.data, chunk.size) == (b"", weights.size)
        (chunk,) = await all_of(read(empty.sha256, 0, 0))
        assert (chunk.data, chunk.size) == (b"", 0)
        for offset in (weights.size + 1, 2**64 - 1):
            code, message = await fails(all_of(read(weights.sha256, offset, 2**64 - 1)))
            assert code is grpc.StatusCode.OUT_OF_RANGE
            assert str(weights.size) in message

    cloud.run(talk)


def test_deltas_are_served_and_counted_apart(cloud: Cloud) -> None:
    cloud.publish()
    (delta,) = cloud.publish(changed=1000).manifest.deltas

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        request = fleet_pb2.ReadRequest(channel="home", sha256=delta.sha256)
        got = b"".join(chunk.data for chunk in await all_of(stub.Read(request)))
        assert hashlib.sha256(got).hexdigest() == delta.sha256
        assert cloud.value("anabranch_served_bytes_total", kind="delta") == delta.size

    cloud.run(talk)


@pytest.mark.parametrize(
    ("channel", "sha256", "code"),
    [
        ("home", "ab" * 32, grpc.StatusCode.NOT_FOUND),
        ("home", "../keys/signing.pem", grpc.StatusCode.INVALID_ARGUMENT),
        ("home", "", grpc.StatusCode.INVALID_ARGUMENT),
        ("home", "AB" * 32, grpc.StatusCode.INVALID_ARGUMENT),
        ("../home", "ab" * 32, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_only_files_of_the_channels_releases_are_read(
    cloud: Cloud, channel: str, sha256: str, code: grpc.StatusCode
) -> None:
    cloud.publish()

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        request = fleet_pb2.ReadRequest(channel=channel, sha256=sha256)
        assert (await fails(all_of(stub.Read(request))))[0] is code

    cloud.run(talk)


def test_a_file_that_was_changed_on_the_disk_is_not_served(cloud: Cloud) -> None:
    sha256 = file(cloud.publish(), "student.json").sha256
    (cloud.folder / "blobs" / sha256).write_bytes(b"other")

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        request = fleet_pb2.ReadRequest(channel="home", sha256=sha256)
        code, message = await fails(all_of(stub.Read(request)))
        assert code is grpc.StatusCode.DATA_LOSS
        assert "publish its bundle again" in message

    cloud.run(talk)


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_truncated_or_garbage_manifest_is_never_served(
    cloud: Cloud, damage: bytes | None
) -> None:
    signed = cloud.publish().signed
    with write(cloud.engine) as session:
        row = session.get(ReleaseRow, ("home", 1))
        assert row is not None
        row.signed = signed[:-1] if damage is None else damage

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        request = fleet_pb2.ManifestRequest(channel="home", release=1)
        assert (await fails(stub.GetManifest(request)))[0] is grpc.StatusCode.DATA_LOSS

    cloud.run(talk)


def test_manifests_that_are_unknown_or_withdrawn_are_refused(cloud: Cloud) -> None:
    cloud.publish()
    cloud.store.withdraw("home", 1)

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        for release, code in (
            (0, grpc.StatusCode.NOT_FOUND),
            (2, grpc.StatusCode.NOT_FOUND),
            (2**64 - 1, grpc.StatusCode.NOT_FOUND),
            (1, grpc.StatusCode.FAILED_PRECONDITION),
        ):
            request = fleet_pb2.ManifestRequest(channel="home", release=release)
            assert (await fails(stub.GetManifest(request)))[0] is code

    cloud.run(talk)


def test_a_watch_says_the_target_at_once_and_whenever_it_changes(cloud: Cloud) -> None:
    first = cloud.publish()

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        stream = aiter(stub.Watch(watch_request()))
        assert (await anext(stream)).release == 0
        cloud.begin(first)
        assert (await anext(stream)).release == 1
        assert (await stub.Report(report("hall", first))).accepted
        second = await asyncio.to_thread(cloud.publish, 10)
        cloud.begin(second)
        assert (await anext(stream)).release == 2

    cloud.run(talk)


def test_a_device_is_online_as_long_as_it_watches(cloud: Cloud) -> None:
    cloud.begin(cloud.publish())

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        def online() -> bool:
            return cloud.driver.state("home").devices["hall"].online

        call = stub.Watch(watch_request())
        await call.read()
        assert online()
        assert cloud.value("anabranch_watch_streams") == 1
        call.cancel()
        await until(lambda: not online())
        await until(lambda: cloud.value("anabranch_watch_streams") == 0)

    cloud.run(talk)


def test_streams_that_are_cancelled_at_once_leave_nobody_online(cloud: Cloud) -> None:
    cloud.begin(cloud.publish())

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        calls = [stub.Watch(watch_request(f"device-{n}")) for n in range(40)]
        await asyncio.sleep(0.02)
        for call in calls:
            call.cancel()
        last = stub.Watch(watch_request("last"))
        await last.read()
        await until(
            lambda: (
                [d.name for d in cloud.driver.state("home").devices.values() if d.online]
                == ["last"]
            )
        )

    cloud.run(talk)


def test_a_restarted_cloud_knows_the_target_and_nobody_is_online(cloud: Cloud) -> None:
    release = cloud.publish()
    cloud.begin(release)

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        call = stub.Watch(watch_request())
        target = await call.read()
        assert isinstance(target, fleet_pb2.Target)
        assert target.release == 1

    cloud.run(talk)
    again = Cloud(cloud.folder)
    assert not again.driver.state("home").devices["hall"].online
    again.run(talk)


def test_two_hundred_devices_watch_and_are_rolled_out(cloud: Cloud) -> None:
    release = cloud.publish()
    devices = [f"device-{n}" for n in range(200)]

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        before = len(asyncio.all_tasks())
        targets: dict[str, int] = {}

        async def live(device: str) -> None:
            call = stub.Watch(watch_request(device))
            async for target in call:
                targets[device] = target.release
                if target.release == release.version:
                    break
            assert (await stub.Report(report(device, release))).accepted
            call.cancel()

        async with asyncio.TaskGroup() as group:
            for device in devices:
                group.create_task(live(device))
            await until(lambda: len(targets) == len(devices))
            assert set(targets.values()) == {0}
            assert cloud.value("anabranch_watch_streams") == len(devices)
            await asyncio.to_thread(cloud.begin, release)
        assert cloud.driver.state("home").phase is Phase.DONE
        assert set(targets.values()) == {1}
        await until(lambda: cloud.value("anabranch_watch_streams") == 0)
        await until(lambda: len(asyncio.all_tasks()) <= before + 1)

    cloud.run(talk)


def test_reports_count_once_and_older_ones_are_not_accepted(cloud: Cloud) -> None:
    release = cloud.publish()

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        await stub.Watch(watch_request()).read()
        cloud.begin(release)
        failed = report("hall", release, sequence=5)
        failed.state, failed.detail = fleet_pb2.UPDATE_STATE_FAILED, "probe: " + "x" * 10_000
        for _ in range(2):
            assert (await stub.Report(failed)).accepted
        assert not (await stub.Report(report("hall", release, sequence=4))).accepted
        state = cloud.driver.state("home")
        assert state.phase is Phase.HALTED
        assert state.devices["hall"].health is Health.FAILED
        assert len(state.devices["hall"].reason) == 500

    cloud.run(talk)


def test_malformed_requests_say_what_is_wrong(cloud: Cloud) -> None:
    release = cloud.publish()

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        for field, value, code in (
            ("device", "#", invalid),
            ("device", "", invalid),
            ("device", "a" * 65, invalid),
            ("channel", "a/b", invalid),
            ("channel", "office", grpc.StatusCode.NOT_FOUND),
            ("student", "smol", invalid),
        ):
            request = watch_request()
            setattr(request, field, value)
            got, message = await fails(all_of(stub.Watch(request)))
            assert (got, bool(message)) == (code, True)
            bad = report("hall", release)
            setattr(bad, field, value)
            assert (await fails(stub.Report(bad)))[0] is code
        for field, number in (("sequence", 0), ("state", 0), ("state", 99)):
            bad = report("hall", release)
            setattr(bad, field, number)
            assert (await fails(stub.Report(bad)))[0] is invalid
        for manifest in ("a/b", ""):
            call = stub.GetManifest(fleet_pb2.ManifestRequest(channel=manifest, release=1))
            assert (await fails(call))[0] is invalid
        assert cloud.driver.state("home").devices == {}

    cloud.run(talk)


def test_garbage_on_the_wire_ends_its_call_alone(cloud: Cloud) -> None:
    release = cloud.publish()

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        async with aio.insecure_channel(cloud.address) as channel:
            garbage = channel.unary_unary("/anabranch.v1.Fleet/Report")
            assert (await fails(garbage(b"\xff" * 100)))[0] is grpc.StatusCode.INTERNAL
            huge = b"\x0a" * (grpc_options.MAX_MESSAGE_BYTES + 1)
            assert (await fails(garbage(huge)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Report(report("hall", release))).accepted

    cloud.run(talk)


def test_a_disk_that_is_full_asks_for_the_report_again(cloud: Cloud) -> None:
    release = cloud.publish()

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        await stub.Watch(watch_request()).read()
        limit = "PRAGMA max_page_count = {}"
        # The pool gives connections out anew; each of them has to learn the limit.
        cloud.engine.dispose()
        with cloud.engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(limit.format(pages))
        reports = [report(f"device-{n}", release) for n in range(200)]
        codes = []
        for request in reports:
            request.state = fleet_pb2.UPDATE_STATE_FETCHING
            try:
                await stub.Report(request)
            except aio.AioRpcError as error:
                codes.append(error.code())
        assert set(codes) == {grpc.StatusCode.UNAVAILABLE}

    cloud.run(talk)


def test_reading_that_is_cancelled_leaves_no_file_open(cloud: Cloud) -> None:
    sha256 = file(cloud.publish()).sha256

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        await stub.Watch(watch_request()).read()
        blob = cloud.store.blobs.path(sha256)
        for _ in range(10):
            call = stub.Read(fleet_pb2.ReadRequest(channel="home", sha256=sha256))
            await call.read()
            call.cancel()

        def is_open() -> bool:
            return any(fd.exists() and fd.samefile(blob) for fd in Path("/proc/self/fd").iterdir())

        await until(lambda: not is_open())

    cloud.run(talk)


def test_a_second_cloud_on_the_same_port_fails_at_once(cloud: Cloud) -> None:
    async def talk(_: fleet_pb2_grpc.FleetAsyncStub) -> None:
        with pytest.raises(UnavailableError, match="cannot listen"):
            await serve(cloud.service, listen=cloud.address)

    cloud.run(talk)


def test_devices_ping_less_often_than_the_server_allows() -> None:
    client, server = dict(grpc_options.CLIENT), dict(grpc_options.SERVER)
    allowed = server["grpc.http2.min_recv_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_time_ms"] >= 2 * allowed
    assert trust.MAX_SIGNED_BYTES < grpc_options.MAX_MESSAGE_BYTES
