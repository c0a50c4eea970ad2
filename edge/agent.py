"""The device's process: wires the rooms of ``edge/`` together, and stops them in good order.

State folder::

    STATE/lock            held by the agent that runs here
    STATE/agent.json      its pid and addresses, while it runs
    STATE/slots/          students, and which one serves
    STATE/update/         the update client's journal
    STATE/downloads/      what is being fetched
    STATE/trust/          signed metadata that was believed last
    STATE/outbox.sqlite   evidence that the cloud has not stored yet
    STATE/memory.sqlite   working memory

Its identity is a folder of its own (``edge/identity/files.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import time
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn
from prometheus_client import CollectorRegistry

from edge.api.app import create_app
from edge.api.service import Assistant, Identity
from edge.delta.files import write_atomic
from edge.drift.monitor import DriftConfig, DriftMonitor
from edge.host import Servable, StudentHost
from edge.identity.held import held_identity, renewed_identity
from edge.identity.renew import channel_credentials
from edge.identity.tls import client_context
from edge.link.address import Address, check_plain, parse_address
from edge.link.metrics import LinkMetrics
from edge.link.outbox import Outbox
from edge.link.uplink import InService, Uplink
from edge.memory.store import Memory
from edge.metrics import DeviceMetrics
from edge.process import (
    give_memory_back,
    listen_address,
    listening,
    locked,
    log_to_stderr,
    metrics_server,
)
from edge.student.runtime import Student, Warmth
from edge.update import probe, trust
from edge.update.client import UpdateClient
from edge.update.grpc_transport import GrpcTransport
from edge.update.room import has_room
from edge.update.slots import Slots
from edge.update.work import Device
from protos.errors import InvalidInputError, StorageError
from protos.topics import check_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from edge.identity.files import Identity as Certified
    from edge.update.slots import Entry
    from protos.v1 import release_pb2

_LOG = logging.getLogger(__name__)
_SHORT = 12
_FRESH_FIRST_S = 60.0
_FRESH_EVERY_S = 6 * 3600.0  # a quarter of what a timestamp lasts
_FINISH_S = 5  # for requests in flight when the agent is told to stop
_KEEP_ALIVE_S = 300  # a connection closed just when it is used again would cost a request


class Served(Servable, probe.Student, Protocol):
    """A student that can serve and be probed."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What ``anabranch edge`` is told. Addresses are ``host:port``.

    Attributes:
        state: folder of everything that lasts.
        device: this device's name.
        channel: the channel whose releases it runs.
        student: bundle of its first student; None where its state has one already.
        trust: the trusted root of the cloud's TUF repository (``root.json``).
        broker: the MQTT broker.
        cloud: the gRPC fleet service.
        listen: where the HTTP API listens; port 0 takes a free one.
        metrics: where Prometheus finds ``/metrics``; port 0 takes a free one.
        threads: that a student computes with.
        expected_corrections: share of answers that people correct when all is well.
        memory_limit: resident bytes that a second student beside the first may not pass; 0 leaves
            it to what system and service manager allow.
        identity: folder of its key and certificate; None: without TLS, on this machine alone.
        insecure: go without TLS across a network.
    """

    state: Path
    device: str
    channel: str
    student: Path | None
    trust: Path
    broker: str
    cloud: str
    listen: str = "127.0.0.1:8181"
    metrics: str = "127.0.0.1:9181"
    threads: int = 2
    expected_corrections: float = DriftConfig.expected_corrections
    memory_limit: int = 0
    identity: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is touched."""
        check_name(self.device, "device")
        check_name(self.channel, "channel")
        for address in (self.broker, self.cloud):
            parse_address(address)
        for address in (self.listen, self.metrics):
            listen_address(address)
        if self.identity is None and not self.insecure:
            for what, address in (("the broker", self.broker), ("the cloud", self.cloud)):
                check_plain(parse_address(address).host, what, instead="--identity")
        if self.threads < 1:
            msg = f"threads is {self.threads}; it must be at least 1"
            raise InvalidInputError(msg)
        DriftConfig(expected_corrections=self.expected_corrections)


def run(config: AgentConfig, *, open_student: Callable[[Path], Served] | None = None) -> None:
    """Run a device until SIGINT or SIGTERM. Call it from the main thread.

    Args:
        config: the options.
        open_student: opens the bundle in a folder; ONNX Runtime does where this is None.

    Raises:
        InvalidInputError: an option is wrong, another agent runs on this state, or an address is
            taken.
        IntegrityError: no student can serve.
        StorageError: the disk is full or failed.
    """
    log_to_stderr()
    opener = open_student or partial(_open, threads=config.threads)
    with locked(config.state), held_identity(config.identity, device=config.device) as identity:
        root = trust.load_root(config.trust)
        slots = Slots(config.state / "slots")
        student, serving = slots.start(bundle=config.student, open_student=opener)
        asyncio.run(
            _serve(
                config,
                root,
                slots,
                opener,
                student,
                serving,
                identity,
            )
        )


def _open(folder: Path, *, threads: int) -> Student:
    student = Student.open(folder, threads=threads)
    # What the first request would do else, and what it would leave of memory.
    student.warm(Warmth(student.harness.system, (), ()))
    give_memory_back()
    return student


class _Server(uvicorn.Server):
    """uvicorn, but signals are the agent's: it has more to stop than HTTP."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """Finish what is in flight, then end; at once when told twice."""
        self.force_exit = self.should_exit
        self.should_exit = True


async def _serve(
    config: AgentConfig,
    root: bytes,
    slots: Slots,
    open_student: Callable[[Path], Served],
    student: Served,
    serving: Entry,
    identity: Certified | None,
) -> None:
    """Everything that runs, from the start of its parts to their end in the opposite order."""
    loop = asyncio.get_running_loop()
    randomness = random.SystemRandom()
    registry = CollectorRegistry()
    async with AsyncExitStack() as stack:
        memory = Memory(path=config.state / "memory.sqlite")
        stack.callback(memory.close)
        outbox = Outbox(config.state / "outbox.sqlite", clock=time.time)
        stack.callback(outbox.close)
        host = StudentHost(student=student)
        stack.push_async_callback(host.close)
        metrics = DeviceMetrics(registry)

        def in_service() -> InService:
            return InService(updates.status.serving.student, updates.status.serving.release)

        uplink = Uplink(
            channel=config.channel,
            device=config.device,
            agent_version=version("anabranch"),
            address=parse_address(config.broker),
            outbox=outbox,
            in_service=in_service,
            metrics=LinkMetrics(registry),
            clock=time.time,
            random=randomness,
            tls=None
            if identity is None
            else partial(client_context, pair=identity.file, authorities=identity.authorities),
        )
        stack.push_async_callback(asyncio.to_thread, uplink.stop)
        assistant = Assistant(
            identity=Identity(config.channel, config.device),
            host=host,
            memory=memory,
            drift=DriftMonitor(
                config=DriftConfig(expected_corrections=config.expected_corrections)
            ),
            outbox=outbox,
            wake=uplink.wake,
            metrics=metrics,
            clock=time.time,
            random=randomness,
        )

        async def exchange(new: Served) -> None:
            await host.swap(new)
            give_memory_back()
            assistant.swapped()
            uplink.announce()
            _LOG.info("student %s serves", new.digest[:_SHORT])

        def on_commit(manifest: release_pb2.Manifest) -> None:
            wiped = memory.wipe(manifest.learned_from)
            uplink.announce()
            _LOG.info(
                "release %d serves; %d demonstrations of working memory are in its weights",
                manifest.version,
                wiped,
            )

        transport = GrpcTransport(
            address=str(parse_address(config.cloud)),
            channel=config.channel,
            device=config.device,
            credentials=None if identity is None else channel_credentials(identity),
        )
        updates = UpdateClient(
            state=config.state,
            slots=slots,
            serving=serving,
            device=Device(
                open_student=open_student,
                swap=lambda new: asyncio.run_coroutine_threadsafe(exchange(new), loop).result(),
                reopen=partial(slots.start, bundle=config.student, open_student=open_student),
                on_commit=on_commit,
                has_room=partial(has_room, limit=config.memory_limit),
                unload=lambda: asyncio.run_coroutine_threadsafe(host.unload(), loop).result(),
            ),
            transport=transport,
            trusted=trust.TufReleases(
                root=root,
                folder=config.state / "trust",
                channel=config.channel,
                transport=transport,
                clock=time.time,
            ),
            clock=time.time,
            random=randomness,
            registry=registry,
        )
        stack.push_async_callback(asyncio.to_thread, updates.stop)
        stack.enter_context(
            renewed_identity(
                identity, cloud=config.cloud, fleet=transport, broker=uplink, registry=registry
            )
        )
        metrics.watch_memory(lambda: memory.size)
        metrics.watch_student(in_service)

        def status() -> Mapping[str, object]:
            now = updates.status
            return {
                "release": now.serving.release,
                "update": {k: v for k, v in asdict(now).items() if k != "serving"},
                "broker_connected": uplink.connected,
                "evidence_held": uplink.held,
            }

        listener = stack.enter_context(listening(config.listen))
        metrics_address = stack.enter_context(metrics_server(config.metrics, registry))
        server = _Server(
            uvicorn.Config(
                create_app(assistant=assistant, metrics=metrics, status=status),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_FINISH_S,
            )
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        uplink.start()
        updates.start()
        freshness = asyncio.create_task(_stay_fresh(updates, randomness))
        stack.callback(freshness.cancel)
        address = Address(*listener.getsockname()[:2])
        stack.enter_context(
            _announced(config, address=address, metrics=metrics_address, student=serving.student)
        )
        _LOG.info(
            "device %s of channel %s: student %s, release %d",
            config.device,
            config.channel,
            serving.student[:_SHORT],
            serving.release,
        )
        _LOG.info("API on http://%s, metrics on http://%s/metrics", address, metrics_address)
        _LOG.info("broker %s, cloud %s, state %s", config.broker, config.cloud, config.state)
        await server.serve(sockets=[listener])
        _LOG.info("stopping")
    _LOG.info("stopped")


async def _stay_fresh(updates: UpdateClient[Served], randomness: random.Random) -> None:
    """Ask the cloud for fresh metadata soon after the start, and then a few times a day."""
    await asyncio.sleep(randomness.uniform(0, _FRESH_FIRST_S))
    while True:
        await asyncio.to_thread(updates.freshness)
        await asyncio.sleep(randomness.uniform(0.5, 1) * _FRESH_EVERY_S)


@contextmanager
def _announced(
    config: AgentConfig, *, address: Address, metrics: Address, student: str
) -> Iterator[None]:
    """Write STATE/agent.json, for people and programs that look for this agent."""
    file = config.state / "agent.json"
    body: dict[str, Any] = {
        "version": 1,
        "pid": os.getpid(),
        "channel": config.channel,
        "device": config.device,
        "student": student,
        "api": f"http://{address}",
        "metrics": f"http://{metrics}/metrics",
    }
    try:
        write_atomic(file, json.dumps(body, indent=1).encode() + b"\n")
    except StorageError as error:
        _LOG.warning("%s; the agent serves all the same", error)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
