"""Manifests and files over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from cloud.rollout.state import Phase
from edge.update.fetch import Downloads
from edge.update.grpc_transport import GrpcTransport
from edge.update.manifest import parse
from edge.update.plan import Download
from edge.update.trust import TufReleases, load_root
from protos import grpc_options
from protos.errors import IntegrityError
from protos.v1 import fleet_pb2, fleet_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from tests.fleet.fleet_cloud import (
        CHUNK,
        WEIGHTS,
        Cloud,
        all_of,
        fails,
        file,
        report,
        until,
        watch_request,
    )
else:
    from fleet_cloud import (
        CHUNK,
        WEIGHTS,
        Cloud,
        all_of,
        fails,
        file,
        report,
        until,
        watch_request,
    )


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def believing(cloud: Cloud, folder: Path, transport: GrpcTransport) -> TufReleases:
    """What a device with this cloud's root has of it."""
    return TufReleases(
        root=load_root(cloud.folder / "tuf" / "root.json"),
        folder=folder,
        channel="home",
        transport=transport,
        clock=lambda: 1e9,
    )


def test_the_manifest_is_what_devices_believe(cloud: Cloud, tmp_path: Path) -> None:
    releases = [cloud.publish(), cloud.publish(changed=1000)]

    def device() -> None:
        transport = GrpcTransport(address=cloud.address, channel="home", device="hall")
        try:
            trusted = believing(cloud, tmp_path / "device", transport)
            for release in releases:
                data = trusted.manifest(release.version)
                assert parse(data, channel="home", release=release.version) == release.manifest
                assert trusted.manifest(release.version, kept=data) is data
            with pytest.raises(IntegrityError, match="lists no manifest home/3"):
                trusted.manifest(3)
        finally:
            transport.close()

    async def talk(_: fleet_pb2_grpc.FleetAsyncStub) -> None:
        await asyncio.to_thread(device)
        assert (cloud.value("anabranch_served_bytes_total", kind="manifest") or 0) > 500
        assert (cloud.value("anabranch_served_bytes_total", kind="metadata") or 0) > 500

    cloud.run(talk)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("2.root.json", grpc.StatusCode.NOT_FOUND),
        ("root.json", grpc.StatusCode.NOT_FOUND),
        ("../root.json", grpc.StatusCode.NOT_FOUND),
        ("../../keys/root.pem", grpc.StatusCode.NOT_FOUND),
        ("x" * 100_000, grpc.StatusCode.NOT_FOUND),
    ],
)
def test_only_metadata_that_was_published_is_read(
    cloud: Cloud, name: str, code: grpc.StatusCode
) -> None:
    cloud.publish()

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        request = fleet_pb2.ReadRequest(channel="home", metadata=name)
        assert (await fails(all_of(stub.Read(request))))[0] is code
        request.metadata = "timestamp.json"
        (chunk,) = await all_of(stub.Read(request))
        assert chunk.data == (cloud.folder / "tuf" / "metadata" / "timestamp.json").read_bytes()
        request.offset = 10_000
        assert (await fails(all_of(stub.Read(request))))[0] is grpc.StatusCode.OUT_OF_RANGE

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
        ("home", "../keys/root.pem", grpc.StatusCode.INVALID_ARGUMENT),
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
    cloud.publish()
    sha256 = cloud.manifest(1)
    file = cloud.store.blobs.path(sha256)
    file.write_bytes(file.read_bytes()[:-1] if damage is None else damage)

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        request = fleet_pb2.ReadRequest(channel="home", sha256=sha256)
        assert (await fails(all_of(stub.Read(request))))[0] is grpc.StatusCode.DATA_LOSS

    cloud.run(talk)


def test_the_manifest_of_a_withdrawn_release_is_not_given_out(cloud: Cloud) -> None:
    cloud.publish()
    cloud.publish(changed=10)
    cloud.store.withdraw("home", 1)

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        request = fleet_pb2.ReadRequest(channel="home", sha256=cloud.manifest(1))
        code, message = await fails(all_of(stub.Read(request)))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "was withdrawn" in message
        request.sha256 = cloud.manifest(2)
        assert await all_of(stub.Read(request))

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


def test_the_devices_own_transport_gets_a_whole_release(cloud: Cloud, tmp_path: Path) -> None:
    release = cloud.publish()
    weights = file(release)
    download = Download("file", weights.sha256, weights.size)

    def device() -> None:
        transport = GrpcTransport(address=cloud.address, channel="home", device="hall")
        try:
            targets = transport.watch(student="aa" * 32, release=0)
            assert next(targets) == 0
            cloud.begin(release)
            assert next(targets) == release.version
            trusted = believing(cloud, tmp_path / "trust", transport)
            data = trusted.manifest(release.version)
            assert parse(data, channel="home", release=release.version) == release.manifest
            downloads = Downloads(tmp_path / "downloads")
            downloads.fetch(download, transport, took=lambda _, __: None, interrupted=lambda: False)
            downloads.verify(download)
            transport.report(report("hall", release))
        finally:
            transport.close()

    async def talk(_: fleet_pb2_grpc.FleetAsyncStub) -> None:
        await asyncio.to_thread(device)
        assert cloud.driver.state("home").phase is Phase.DONE

    cloud.run(talk)
