"""Manifests and files over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from cloud.db import write
from cloud.releases.tables import ReleaseRow
from cloud.rollout.state import Phase
from edge.update import trust
from edge.update.fetch import Downloads
from edge.update.grpc_transport import GrpcTransport
from edge.update.plan import Download
from protos import grpc_options
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
            assert transport.get_manifest(release.version) == release.signed
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
