"""A device's outbox, a real broker and the cloud's store: whatever dies, nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry

from cloud.evidence.ingest import Ingest
from cloud.evidence.metrics import IngestMetrics
from edge.link.address import parse_address
from edge.link.metrics import LinkMetrics
from edge.link.outbox import DEMONSTRATION, DRIFT, Outbox
from edge.link.policy import SendPolicy
from edge.link.uplink import InService, Uplink

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from cloud.evidence.store import EvidenceStore
    from protos.v1 import device_pb2

Eventually = Callable[[Callable[[], object]], None]
Demonstrate = Callable[..., "device_pb2.Demonstration"]
ReportDrift = Callable[..., "device_pb2.DriftReport"]
QUICK = SendPolicy(window=8, ack_timeout_s=0.5, silence_cap_s=0.5)


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with closing(Outbox(tmp_path / "outbox.db", clock=time.time)) as box:
        yield box


@contextmanager
def device(broker: str, outbox: Outbox) -> Iterator[Uplink]:
    uplink = Uplink(
        channel="home",
        device="lamp-1",
        agent_version="0.1.0",
        address=parse_address(broker),
        outbox=outbox,
        in_service=lambda: InService("d" * 64, 0),
        metrics=LinkMetrics(CollectorRegistry()),
        clock=time.time,
        random=Random(0),
        policy=QUICK,
    )
    uplink.start()
    try:
        yield uplink
    finally:
        uplink.stop(0.1)


@contextmanager
def cloud(broker: str, store: EvidenceStore) -> Iterator[Ingest]:
    ingest = Ingest(
        address=parse_address(broker),
        store=store,
        metrics=IngestMetrics(CollectorRegistry(), channels=["home"]),
        random=Random(),
    )
    ingest.start()
    try:
        yield ingest
    finally:
        ingest.stop()


@contextmanager
def process(program: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", program]) as running:
        try:
            yield running
        finally:
            running.kill()


def broker_program(listen: str, workdir: Path) -> str:
    return f"""
from pathlib import Path
from cloud.broker import EmbeddedBroker
EmbeddedBroker(listen={listen!r}, workdir=Path({str(workdir)!r})).run_forever()
"""


def put(outbox: Outbox, message: device_pb2.Demonstration) -> str:
    outbox.put(DEMONSTRATION, message.id, message.SerializeToString())
    return message.id


def stored(store: EvidenceStore) -> set[str]:
    return {m.id for m in store.demonstrations("home")}


def test_evidence_goes_from_the_outbox_into_the_store(
    broker: str,
    outbox: Outbox,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    report_drift: ReportDrift,
    eventually: Eventually,
) -> None:
    with cloud(broker, store), device(broker, outbox) as uplink:
        ids = {put(outbox, demonstrate()) for _ in range(30)}
        report = report_drift()
        outbox.put(DRIFT, report.id, report.SerializeToString())
        uplink.wake()
        eventually(lambda: outbox.counts().waiting == 0)
        assert stored(store) == ids
        assert store.drift_reports("home") == [report]
        eventually(lambda: [d.online for d in store.devices("home")] == [True])
        uplink.stop(0.1)
        eventually(lambda: [d.online for d in store.devices("home")] == [False])


def test_what_the_cloud_rejects_is_set_aside_on_the_device(
    broker: str,
    outbox: Outbox,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    eventually: Eventually,
) -> None:
    useless, of_another = demonstrate(), demonstrate(device="lamp-2")
    useless.ClearField("correction")
    with cloud(broker, store), device(broker, outbox) as uplink:
        for message in (useless, of_another):
            put(outbox, message)
        good = put(outbox, demonstrate())
        uplink.wake()
        eventually(lambda: outbox.counts().waiting == 0)
    reasons = {r.id: r.reason for r in outbox.rejected(9)}
    assert "should have been" in reasons[useless.id]
    assert "lamp-2" in reasons[of_another.id]
    assert stored(store) == {good}


def test_a_cloud_that_is_away_gets_everything_when_it_comes_back(
    broker: str,
    outbox: Outbox,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    eventually: Eventually,
) -> None:
    with device(broker, outbox) as uplink:
        assert uplink.wait_connected(20)
        ids = {put(outbox, demonstrate()) for _ in range(20)}
        uplink.wake()
        time.sleep(1)  # long enough to be sent to nobody
        assert outbox.counts().waiting == 20
        with cloud(broker, store):
            eventually(lambda: outbox.counts().waiting == 0)
    assert stored(store) == ids


def test_a_full_disk_in_the_cloud_leaves_evidence_on_the_device(
    broker: str,
    outbox: Outbox,
    full_disk: Callable[[], AbstractContextManager[None]],
    store: EvidenceStore,
    demonstrate: Demonstrate,
    eventually: Eventually,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with cloud(broker, store) as ingest, device(broker, outbox) as uplink:
        assert ingest.wait_connected(20)
        with full_disk():
            ids = {put(outbox, demonstrate(answer="x" * 50_000)) for _ in range(3)}
            uplink.wake()
            eventually(lambda: "database or disk is full" in caplog.text)
            assert outbox.counts().waiting == 3
        eventually(lambda: outbox.counts().waiting == 0)
    assert stored(store) == ids


def test_a_broker_killed_in_the_middle_and_started_again_loses_nothing(
    tmp_path: Path,
    outbox: Outbox,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    eventually: Eventually,
    free_port: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge.link.mqtt._RETRY_CAP_S", 1.0)
    listen = f"127.0.0.1:{free_port()}"
    program = broker_program(listen, tmp_path / "broker")
    ids = {put(outbox, demonstrate()) for _ in range(20)}  # before there is a broker at all
    with cloud(listen, store) as ingest, device(listen, outbox) as uplink:
        for _ in range(2):
            with process(program) as broker:
                eventually(lambda: uplink.connected and ingest.connected)
                for _ in range(100):
                    ids.add(put(outbox, demonstrate()))
                    uplink.wake()
                broker.send_signal(signal.SIGKILL)
                broker.wait(20)
            ids |= {put(outbox, demonstrate()) for _ in range(10)}
            eventually(lambda: not uplink.connected and not ingest.connected)
        with process(program):
            eventually(lambda: outbox.counts().waiting == 0)
    assert outbox.counts().rejected == 0
    assert stored(store) == ids


def test_an_ingest_killed_in_the_middle_and_started_again_loses_nothing(
    broker: str,
    outbox: Outbox,
    engine: Engine,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    eventually: Eventually,
) -> None:
    program = f"""
import pathlib, random, time
from prometheus_client import CollectorRegistry
from cloud.db import open_database
from cloud.evidence.ingest import Ingest
from cloud.evidence.metrics import IngestMetrics
from cloud.evidence.store import EvidenceStore
from edge.link.address import parse_address
store = EvidenceStore(open_database(pathlib.Path({engine.url.database!r})), clock=time.time)
Ingest(
    address=parse_address({broker!r}),
    store=store,
    metrics=IngestMetrics(CollectorRegistry(), channels=["home"]),
    random=random.Random(),
).start()
time.sleep(60)
"""
    ids: set[str] = set()
    with device(broker, outbox) as uplink:
        for _ in range(2):
            ids |= {put(outbox, demonstrate()) for _ in range(60)}
            uplink.wake()
            known = len(stored(store))
            with process(program) as running:
                while len(stored(store)) < known + 10:
                    time.sleep(0.002)
                running.send_signal(signal.SIGKILL)
        with process(program):
            eventually(lambda: outbox.counts().waiting == 0)
    assert stored(store) == ids


def test_a_device_killed_in_the_middle_and_started_again_loses_nothing(
    broker: str, tmp_path: Path, store: EvidenceStore, eventually: Eventually
) -> None:
    path = tmp_path / "device.db"
    program = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_round_trip import DEMONSTRATION, Outbox, device
from protos.v1 import device_pb2
start = int(sys.argv[1])
outbox = Outbox(Path({str(path)!r}), clock=time.time)
with device({broker!r}, outbox) as uplink:
    for n in range(start, start + 100_000):
        message = device_pb2.Demonstration(
            id=f"01900000-0000-7000-9000-{{n:012x}}", channel="home", device="lamp-1",
            student="s", created_ms=n + 1, correction="x", source=1,
            messages=[device_pb2.ChatMessage(role="user", content="x")],
        )
        outbox.put(DEMONSTRATION, message.id, message.SerializeToString())
        print(message.id, flush=True)
        uplink.wake()
"""
    ids: set[str] = set()
    with cloud(broker, store):
        for start in (0, 1_000_000):
            known = len(stored(store))
            command = [sys.executable, "-c", program, str(start)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
                assert running.stdout is not None
                for line in running.stdout:
                    ids.add(line.strip())
                    if len(stored(store)) > known + 20:
                        break
                running.send_signal(signal.SIGKILL)
                ids |= {rest.strip() for rest in running.stdout if rest.endswith("\n")}
        with closing(Outbox(path, clock=time.time)) as outbox, device(broker, outbox):
            eventually(lambda: outbox.counts().waiting == 0)
    assert ids <= stored(store)
    assert len(stored(store)) - len(ids) <= 2, "at most one more a life: put, but not yet said"
