"""The cloud's process: wires ingest, policy, jobs, releases, rollouts and the fleet service.

State folder::

    STATE/lock             held by the cloud that runs here
    STATE/cloud.json       pid and addresses, while it runs
    STATE/cloud.sqlite     evidence, releases, rollouts
    STATE/keys/            private keys that sign releases here
    STATE/tuf/             signed metadata; root.json for devices; what is to be signed elsewhere
    STATE/identity/        the certificate authority, and ca.pem for devices
    STATE/blobs/ bundles/  released files by content
    STATE/jobs/            adaptations
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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from cloud import db
from cloud.curator import Curator, CuratorConfig
from cloud.evidence.ingest import Ingest
from cloud.evidence.metrics import IngestMetrics
from cloud.evidence.quota import EvidenceLimits
from cloud.evidence.store import EvidenceStore
from cloud.fleet.service import FleetService, serve
from cloud.guarding import Guarding
from cloud.identity.security import Security, TlsConfig
from cloud.identity.service import serve_enrolment
from cloud.jobs import Jobs
from cloud.releases.metadata import Lifetimes
from cloud.releases.store import ReleaseStore
from cloud.rollout.driver import RolloutDriver
from cloud.rollout.plan import Plan
from cloud.students.importer import open_imported
from edge.delta.files import write_atomic
from edge.link.address import check_plain, parse_address
from edge.process import listen_address, locked, log_to_stderr, metrics_server
from protos.errors import AnabranchError
from protos.topics import check_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from grpc import aio
    from sqlalchemy import Engine

log = logging.getLogger("anabranch.cloud")

_TICK_S = 1.0
_TROUBLE_S = 10.0
_FINISH_S = 1.0  # for reads in flight when the cloud is told to stop


@dataclass(frozen=True, kw_only=True)
class CloudConfig:
    """What ``anabranch cloud`` is told. Addresses are ``host:port``.

    Attributes:
        state: folder of everything that lasts.
        channel: the channel it adapts and releases to.
        student: folder made by ``anabranch student import``.
        broker: the MQTT broker.
        grpc: where devices fetch releases; port 0 takes a free one.
        metrics: where Prometheus finds ``/metrics``; port 0 takes a free one.
        curator: when and how to adapt.
        plan: how careful rollouts are.
        evidence: what one device may give.
        tls: how it is reached with TLS; None: without, on this machine alone.
        insecure: go without TLS across a network.
        lifetimes: how long signed metadata lasts.
    """

    state: Path
    channel: str
    student: Path
    broker: str
    grpc: str = "127.0.0.1:50051"
    metrics: str = "127.0.0.1:9108"
    curator: CuratorConfig = field(default_factory=CuratorConfig)
    plan: Plan = field(default_factory=Plan)
    evidence: EvidenceLimits = field(default_factory=EvidenceLimits)
    tls: TlsConfig | None = None
    insecure: bool = False
    lifetimes: Lifetimes = field(default_factory=Lifetimes)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is touched."""
        check_name(self.channel, "channel")
        parse_address(self.broker)
        for address in (self.grpc, self.metrics):
            listen_address(address)
        if self.tls is None and not self.insecure:
            instead = "--tls-name"
            check_plain(listen_address(self.grpc).host, "the fleet service", instead=instead)
            check_plain(parse_address(self.broker).host, "the broker", instead=instead)


def run(config: CloudConfig) -> None:
    """Run the cloud until SIGINT or SIGTERM. Call it from the main thread.

    Raises:
        InvalidInputError: an option is wrong, or another cloud runs on this state.
        StorageError: the disk is full or failed.
        UnavailableError: an address is taken.
    """
    log_to_stderr()
    imported = open_imported(config.student)
    with locked(config.state):
        asyncio.run(_serve(config, imported.bundle, imported.masters))


async def _serve(config: CloudConfig, bundle: Path, masters: Path) -> None:
    registry = CollectorRegistry()
    async with contextlib.AsyncExitStack() as stack:
        engine = db.open_database(config.state / "cloud.sqlite")
        stack.callback(engine.dispose)
        evidence = EvidenceStore(engine, clock=time.time)
        releases = ReleaseStore(
            folder=config.state,
            engine=engine,
            clock=time.time,
            registry=registry,
            lifetimes=config.lifetimes,
        )
        driver = RolloutDriver(engine=engine, clock=time.time, registry=registry, plan=config.plan)
        jobs = Jobs(config.state / "jobs")
        stack.push_async_callback(asyncio.to_thread, jobs.stop)
        curator = Curator(
            channel=config.channel,
            bundle=bundle,
            masters=masters,
            evidence=evidence,
            releases=releases,
            driver=driver,
            jobs=jobs,
            config=config.curator,
            registry=registry,
        )
        guarding = Guarding(
            channel=config.channel, evidence=evidence, driver=driver, clock=time.time
        )
        security = _security(config, engine, registry)
        if security is not None:
            await asyncio.to_thread(security.look)
        ingest = Ingest(
            address=parse_address(config.broker),
            store=evidence,
            metrics=IngestMetrics(registry, channels=[config.channel]),
            random=random.SystemRandom(),
            channel=config.channel,
            check_sender=security.keeper.check_name if security else None,
            limits=config.evidence,
            tls=security.broker_context if security else None,
        )
        await asyncio.to_thread(curator.begin)
        ingest.start()
        stack.push_async_callback(asyncio.to_thread, ingest.stop)
        service = FleetService(
            store=releases,
            driver=driver,
            registry=registry,
            access=security.access if security else None,
        )
        server, port = await serve(
            service,
            listen=config.grpc,
            credentials=security.server.credentials(mutual=True) if security else None,
            also=[security.serve_renewal] if security else [],
        )
        stack.push_async_callback(_stop_serving, server, service)
        enrolment = None
        if security is not None and config.tls is not None:
            enrolment = await _enrol(config.tls.enrolment, security, stack)
        host = config.grpc.rpartition(":")[0]
        metrics = stack.enter_context(metrics_server(config.metrics, registry))
        note = {
            "version": 1,
            "pid": os.getpid(),
            "channel": config.channel,
            "grpc": f"{host}:{port}",
            "enrolment": enrolment,
            "metrics": f"http://{metrics}/metrics",
        }
        write_atomic(config.state / "cloud.json", json.dumps(note, indent=1).encode() + b"\n")
        stack.callback((config.state / "cloud.json").unlink, missing_ok=True)
        log.info("channel %s: gRPC on %s:%d, metrics on %s", config.channel, host, port, metrics)
        await _tick_until_stopped(releases.sync, driver.tick, guarding.tick, curator.tick)
        log.info("stopping")


def _security(config: CloudConfig, engine: Engine, registry: CollectorRegistry) -> Security | None:
    if config.tls is None:
        log.warning(
            "without TLS: messages are not encrypted, and devices are believed who they say they "
            "are. Good for one machine or a network of yours alone; --tls-name ends it"
        )
        return None
    return Security(
        state=config.state, config=config.tls, engine=engine, clock=time.time, registry=registry
    )


async def _enrol(listen: str, security: Security, stack: contextlib.AsyncExitStack) -> str:
    """Enrol devices, and keep looking at who was revoked; gives the address."""
    server, port = await serve_enrolment(
        security.enrolment, listen=listen, credentials=security.server.credentials(mutual=False)
    )
    stack.push_async_callback(server.stop, _FINISH_S)
    looking = asyncio.create_task(security.keep_looking())
    stack.push_async_callback(_cancel, looking)
    address = f"{listen.rpartition(':')[0]}:{port}"
    log.info("devices enrol at %s", address)
    return address


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _stop_serving(server: aio.Server, service: FleetService) -> None:
    await server.stop(_FINISH_S)
    await service.drain()


async def _tick_until_stopped(*ticks: Callable[[], None]) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    while not stopped.is_set():
        pause = _TICK_S
        for work in ticks:
            try:
                await asyncio.to_thread(work)
            except AnabranchError as error:  # a full disk must not end the service: it retries
                log.error("%s", error)  # noqa: TRY400  # the message is for people
                pause = _TROUBLE_S
            except Exception:  # evidence and releases must go on when adapting does not
                log.exception("the cloud stumbled; it tries again in %.0f s", _TROUBLE_S)
                pause = _TROUBLE_S
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), pause)
