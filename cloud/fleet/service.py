"""The Fleet service of ``protos/v1/fleet.proto`` on ``grpc.aio``.

A watch stream costs one coroutine and one event: no thread, no polling. Everything that may wait
for the disk runs in a thread, so that one slow read holds up nobody else.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import Counter, Gauge

from cloud.fleet.access import Anybody
from cloud.releases.blobs import check_sha256
from cloud.rollout.events import Outcome, Report
from protos.errors import (
    AnabranchError,
    IntegrityError,
    InvalidInputError,
    QuotaError,
    RefusedError,
    StorageError,
    UnavailableError,
)
from protos.grpc_options import MAX_CHUNK_BYTES, MAX_READ_BYTES, SERVER, SERVER_OF_ONE
from protos.topics import check_name
from protos.v1 import fleet_pb2, fleet_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from types import TracebackType
    from typing import Any

    from prometheus_client import CollectorRegistry

    from cloud.fleet.access import Access
    from cloud.releases.store import ReleaseStore
    from cloud.rollout.driver import RolloutDriver

P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger(__name__)


class _UnknownChannelError(InvalidInputError):
    def __init__(self, channel: str) -> None:
        super().__init__(
            f"channel {channel!r} has no release yet: check the device's --channel, or try later"
        )


_CODES: tuple[tuple[type[AnabranchError], grpc.StatusCode], ...] = (
    (_UnknownChannelError, grpc.StatusCode.NOT_FOUND),
    (InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
    (RefusedError, grpc.StatusCode.PERMISSION_DENIED),
    (QuotaError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (IntegrityError, grpc.StatusCode.DATA_LOSS),
    (StorageError, grpc.StatusCode.UNAVAILABLE),
)
_OUTCOMES = {
    fleet_pb2.UPDATE_STATE_IDLE: Outcome.PROGRESS,
    fleet_pb2.UPDATE_STATE_FETCHING: Outcome.PROGRESS,
    fleet_pb2.UPDATE_STATE_VERIFYING: Outcome.PROGRESS,
    fleet_pb2.UPDATE_STATE_APPLYING: Outcome.PROGRESS,
    fleet_pb2.UPDATE_STATE_PROBING: Outcome.PROGRESS,
    fleet_pb2.UPDATE_STATE_ROLLING_BACK: Outcome.PROGRESS,
    fleet_pb2.UPDATE_STATE_COMMITTED: Outcome.COMMITTED,
    fleet_pb2.UPDATE_STATE_FAILED: Outcome.FAILED,
    fleet_pb2.UPDATE_STATE_INCONSISTENT: Outcome.FAILED,
}
_TURNS = 32
SERVICE = fleet_pb2.DESCRIPTOR.services_by_name["Fleet"].full_name
MANIFEST, METADATA = "manifest", "metadata"
_MAX_DETAIL = 500
_MAX_NAME = 80
_MAX_VERSION = 2**63 - 1  # SQLite's numbers have a sign, the protocol's have none


class FleetService(fleet_pb2_grpc.FleetServicer):
    """Serves releases out of the store, and tells the rollout driver what devices say."""

    def __init__(
        self,
        *,
        store: ReleaseStore,
        driver: RolloutDriver,
        registry: CollectorRegistry,
        access: Access | None = None,
    ) -> None:
        self._store = store
        self._access = access or Anybody()
        self._driver = driver
        self._leaving: set[asyncio.Task[None]] = set()
        self._present = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._channels: set[str] = set()
        self._turns = asyncio.Semaphore(_TURNS)
        self._rollouts = ThreadPoolExecutor(1, "rollouts")
        self._served = Counter(
            "anabranch_served_bytes_total",
            "Bytes of releases and of signed metadata sent to devices.",
            ["channel", "kind"],
            registry=registry,
        )
        self._streams = Gauge(
            "anabranch_watch_streams",
            "Open watch streams of devices.",
            ["channel"],
            registry=registry,
        )

    async def Watch(  # noqa: N802 - the name is the protocol's
        self,
        request: fleet_pb2.WatchRequest,
        context: aio.ServicerContext[fleet_pb2.WatchRequest, fleet_pb2.Target],
    ) -> AsyncIterator[fleet_pb2.Target]:
        """Send the device's target now and whenever it changes."""
        async with Errors(context):
            device = check_name(request.device, "device")
            caller = self._access.admit(context, channel=request.channel, device=device)
            channel = await self._known_channel(request.channel)
            check_sha256(request.student)
            changed = asyncio.Event()
            loop = asyncio.get_running_loop()

            def wake() -> None:
                with suppress(RuntimeError):  # the loop was closed: the stream ends with it
                    loop.call_soon_threadsafe(changed.set)

            with (
                caller.watching(wake),
                self._driver.woken(channel, device, wake),
                self._streams.labels(channel).track_inprogress(),
            ):
                async with self._presence(request):
                    sent = None
                    while True:
                        changed.clear()
                        caller.check()
                        target = self._driver.target(channel, device)
                        if target == sent:
                            await changed.wait()
                        else:
                            # A release wakes all streams at once: other calls come between them.
                            async with self._turns:
                                await asyncio.sleep(0)
                            yield fleet_pb2.Target(release=target)
                            sent = target

    async def Read(  # noqa: N802 - the name is the protocol's
        self,
        request: fleet_pb2.ReadRequest,
        context: aio.ServicerContext[fleet_pb2.ReadRequest, fleet_pb2.Chunk],
    ) -> AsyncIterator[fleet_pb2.Chunk]:
        """Send a range of a manifest, file or delta of the channel's releases, or of metadata."""
        async with Errors(context):
            channel = check_name(request.channel, "channel")
            caller = self._access.admit(context, channel=channel, device=None)
            if request.metadata:
                async for chunk in self._read_metadata(request, context):
                    caller.sent(len(chunk.data))
                    yield chunk
                return
            sha256, offset = check_sha256(request.sha256), request.offset
            kind = await asyncio.to_thread(self._store.blob_kind, channel, sha256)
            if kind is None:
                msg = f"no release of channel {channel!r} has a file {sha256}: get the manifest"
                await context.abort(grpc.StatusCode.NOT_FOUND, msg)
            if kind == MANIFEST and await asyncio.to_thread(self._store.withdrawn, channel, sha256):
                msg = "this release was withdrawn: wait for Watch to send a newer one"
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, msg)
            end = offset + min(request.length or MAX_READ_BYTES, MAX_READ_BYTES)
            with caller.reading():
                while True:
                    length = min(MAX_CHUNK_BYTES, end - offset)
                    data, size = await self._piece(sha256, offset, length)
                    if offset > size:
                        msg = f"offset {offset} is past the end of {sha256}, which has {size} bytes"
                        await context.abort(grpc.StatusCode.OUT_OF_RANGE, msg)
                    caller.check()
                    caller.sent(len(data))
                    self._served.labels(channel, kind).inc(len(data))
                    yield fleet_pb2.Chunk(offset=offset, data=data, size=size)
                    offset += len(data)
                    if offset >= min(end, size):
                        return

    async def _read_metadata(
        self,
        request: fleet_pb2.ReadRequest,
        context: aio.ServicerContext[fleet_pb2.ReadRequest, fleet_pb2.Chunk],
    ) -> AsyncIterator[fleet_pb2.Chunk]:
        """Metadata is read whole: it changes under its name, and a range of it proves nothing."""
        data = await asyncio.to_thread(self._store.metadata, request.metadata)
        if data is None:
            msg = f"there is no signed metadata {request.metadata[:_MAX_NAME]!r}"
            await context.abort(grpc.StatusCode.NOT_FOUND, msg)
        offset = request.offset
        if offset > len(data):
            msg = f"offset {offset} is past the end of {request.metadata}: {len(data)} bytes"
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, msg)
        end = min(len(data), offset + (request.length or MAX_READ_BYTES))
        while True:
            piece = data[offset : min(end, offset + MAX_CHUNK_BYTES)]
            self._served.labels(request.channel, METADATA).inc(len(piece))
            yield fleet_pb2.Chunk(offset=offset, data=piece, size=len(data))
            offset += len(piece)
            if offset >= end:
                return

    async def Report(  # noqa: N802 - the name is the protocol's
        self,
        request: fleet_pb2.UpdateReport,
        context: aio.ServicerContext[fleet_pb2.UpdateReport, fleet_pb2.ReportReply],
    ) -> fleet_pb2.ReportReply:
        """Count a device's report once."""
        async with Errors(context):
            self._access.admit(context, channel=request.channel, device=request.device)
            channel = await self._known_channel(request.channel)
            report = _report(request)
            accepted = await self._drive(self._driver.report, channel, report)
            return fleet_pb2.ReportReply(accepted=accepted)

    async def drain(self) -> None:
        """Wait until every watch stream's end is on the disk; call it once the server stopped."""
        await self._quiet.wait()

    async def _known_channel(self, name: str) -> str:
        channel = check_name(name, "channel")
        if channel not in self._channels:  # releases are never deleted: it stays known
            self._channels.update(await asyncio.to_thread(self._store.channels))
        if channel not in self._channels:
            raise _UnknownChannelError(channel)
        return channel

    async def _piece(self, sha256: str, offset: int, length: int) -> tuple[bytes, int]:
        """A piece of a blob: at once from the system's cache, else by a thread from the disk."""
        blobs = self._store.blobs
        cached = blobs.read_cached(sha256, offset, length)
        if cached is not None:
            return cached
        return await asyncio.to_thread(blobs.read, sha256, offset, length)

    async def _drive(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have the driver do something. It does one thing at a time: more threads would only wait.

        And they would take the interpreter away from the event loop, each for some milliseconds.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._rollouts, partial(call, *args, **kwargs))

    @asynccontextmanager
    async def _presence(self, request: fleet_pb2.WatchRequest) -> AsyncIterator[None]:
        """The device is online inside, whenever and however the stream is cancelled."""
        self._present += 1
        self._quiet.clear()
        joining = asyncio.create_task(
            self._drive(
                self._driver.connected,
                request.channel,
                request.device,
                student=request.student,
                release=min(request.release, _MAX_VERSION),
            )
        )
        try:
            # A cancelled wait would leave a thread behind that connects a device for ever.
            await asyncio.shield(joining)
            yield
        finally:
            leaving = asyncio.create_task(self._leave(joining, request.channel, request.device))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _leave(self, joining: asyncio.Task[None], channel: str, device: str) -> None:
        try:
            await asyncio.wait([joining])
            if not joining.cancelled() and joining.exception() is None:
                await self._drive(self._driver.disconnected, channel, device)
        except StorageError:
            # It counts as online until the next start; if it was told to update, the deadline ends
            # that as well.
            _log.exception("cannot note that device %s of channel %s is gone", device, channel)
        finally:
            self._present -= 1
            if self._present == 0:
                self._quiet.set()


class Errors:
    """Ends a call with the status that fits an error of this project."""

    def __init__(self, context: aio.ServicerContext[Any, Any]) -> None:
        self._context = context

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for kind_of_error, code in _CODES:
            if isinstance(error, kind_of_error):
                if isinstance(error, (RefusedError, QuotaError)):
                    _log.warning("a device's call is refused: %s", error)
                elif not isinstance(error, InvalidInputError):
                    _log.error("a device's call ends with %s: %s", code.name, error)
                await self._context.abort(code, str(error))


def _report(request: fleet_pb2.UpdateReport) -> Report:
    outcome = _OUTCOMES.get(request.state)
    if outcome is None:
        msg = f"update state {request.state} is not known here: send one of fleet.proto's"
        raise InvalidInputError(msg)
    if request.sequence < 1:
        msg = "a report needs a sequence of at least 1 that grows with each report"
        raise InvalidInputError(msg)
    return Report(
        device=check_name(request.device, "device"),
        release=request.release,
        outcome=outcome,
        student=check_sha256(request.student),
        sequence=request.sequence,
        detail=request.detail[:_MAX_DETAIL],
    )


async def serve(
    service: FleetService,
    *,
    listen: str,
    credentials: grpc.ServerCredentials | None = None,
    also: Sequence[Callable[[aio.Server], None]] = (),
) -> tuple[aio.Server, int]:
    """Start to serve on ``host:port``; port 0 takes a free one.

    Health is served beside it (``grpc.health.v1``): for the whole server, and for the service by
    its name. It answers from the event loop, so that an answer says that streams are served too.

    Stop it with ``await server.stop(grace)`` and then ``await service.drain()``. Watch streams do
    not end by themselves: a grace longer than running reads need is waited out in vain.

    Args:
        service: the fleet service.
        listen: ``host:port``.
        credentials: of a server with TLS; None serves without.
        also: add more services to the server.

    Returns:
        The running server and its port.

    Raises:
        UnavailableError: the address cannot be bound.
    """
    bounded = () if credentials is None else SERVER_OF_ONE
    server = aio.server(options=(*SERVER, *bounded))
    fleet_pb2_grpc.add_FleetServicer_to_server(service, server)
    checks = health.aio.HealthServicer()
    await checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for add in also:
        add(server)
    port = bind(server, listen, credentials)
    await server.start()
    return server, port


def bind(server: aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> int:
    """Have a server listen on ``host:port``; gives the port.

    Raises:
        UnavailableError: the address cannot be bound.
    """
    try:
        if credentials is None:
            return server.add_insecure_port(listen)
        return server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        msg = f"cannot listen on {listen} ({error}): is another cloud running, or is it no address?"
        raise UnavailableError(msg) from error
