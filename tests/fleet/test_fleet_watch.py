"""Watch streams and reports over real sockets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloud.fleet.service import SERVICE, serve
from cloud.rollout.state import Health, Phase
from edge.update.manifest import MAX_MANIFEST_BYTES
from protos import grpc_options
from protos.errors import UnavailableError
from protos.v1 import fleet_pb2, fleet_pb2_grpc

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fleet.fleet_cloud import (
        Cloud,
        all_of,
        fails,
        report,
        until,
        watch_request,
    )
else:
    from fleet_cloud import (
        Cloud,
        all_of,
        fails,
        report,
        until,
        watch_request,
    )


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


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
    assert not cloud.driver.state("home").devices["hall"].online, "drained"
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
        for channel in ("a/b", ""):
            read = fleet_pb2.ReadRequest(channel=channel, metadata="timestamp.json")
            assert (await fails(all_of(stub.Read(read))))[0] is invalid
        assert cloud.driver.state("home").devices == {}

    cloud.run(talk)


def test_garbage_on_the_wire_ends_its_call_alone(cloud: Cloud) -> None:
    release = cloud.publish()

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        async with aio.insecure_channel(cloud.address) as channel:
            garbage: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                "/anabranch.v1.Fleet/Report"
            )
            assert (await fails(garbage(b"\xff" * 100)))[0] is grpc.StatusCode.UNKNOWN
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


def test_a_second_cloud_on_the_same_port_fails_at_once(cloud: Cloud) -> None:
    async def talk(_: fleet_pb2_grpc.FleetAsyncStub) -> None:
        with pytest.raises(UnavailableError, match="cannot listen"):
            await serve(cloud.service, listen=cloud.address)

    cloud.run(talk)


def test_health_is_answered_as_the_standard_says(cloud: Cloud) -> None:
    async def talk(_: fleet_pb2_grpc.FleetAsyncStub) -> None:
        async with aio.insecure_channel(cloud.address) as channel:
            checks = health_pb2_grpc.HealthStub(channel)
            for service in ("", SERVICE, "anabranch.v1.Fleet"):
                reply = await checks.Check(health_pb2.HealthCheckRequest(service=service))
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
            unknown = checks.Check(health_pb2.HealthCheckRequest(service="nonsense"))
            assert (await fails(unknown))[0] is grpc.StatusCode.NOT_FOUND

    cloud.run(talk)


def test_devices_ping_less_often_than_the_server_allows() -> None:
    client, server = dict(grpc_options.CLIENT), dict(grpc_options.SERVER)
    allowed = server["grpc.http2.min_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_time_ms"] >= 2 * allowed
    assert MAX_MANIFEST_BYTES < grpc_options.MAX_MESSAGE_BYTES


def hurried(options: grpc_options.Options) -> grpc_options.Options:
    """The same settings, 60 times as fast: a ping each second."""
    return tuple((k, v // 60 if k.endswith(("time_ms", "data_ms")) else v) for k, v in options)


def test_a_silent_watch_stream_outlives_many_pings(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud.fleet.service.SERVER", hurried(grpc_options.SERVER))
    monkeypatch.setattr(grpc_options, "CLIENT", hurried(grpc_options.CLIENT))
    cloud.begin(cloud.publish())

    async def talk(stub: fleet_pb2_grpc.FleetAsyncStub) -> None:
        call = stub.Watch(
            fleet_pb2.WatchRequest(channel="home", device="kitchen", student="0" * 64)
        )
        assert (await call.read()) is not grpc.aio.EOF
        with pytest.raises(TimeoutError):  # a connection that is closed would raise another error
            await asyncio.wait_for(call.read(), 6)

    cloud.run(talk)
