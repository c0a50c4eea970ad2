"""The uplink against a real broker; the cloud is played by a client that answers by script."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from random import Random

import pytest
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from prometheus_client import CollectorRegistry

from edge.link.address import parse_address
from edge.link.metrics import LinkMetrics
from edge.link.outbox import DEMONSTRATION, DRIFT, Outbox
from edge.link.policy import SendPolicy
from edge.link.uplink import InService, Uplink
from protos.errors import StorageError
from protos.v1 import device_pb2

Eventually = Callable[[Callable[[], object]], None]
STORED = device_pb2.ACK_STATUS_STORED
QUICK = SendPolicy(window=4, ack_timeout_s=0.2, silence_cap_s=0.2)
_CHANNELS = count()


class ScriptedCloud:
    """Hears everything on a channel, and answers evidence as ``answer`` says."""

    def __init__(self, broker: str, channel: str) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self.answer: Callable[[str, bytes], int | None] = lambda _kind, _payload: None
        self._channel = channel
        self._subscribed = False
        self._client = Client(
            CallbackAPIVersion.VERSION2, client_id=f"scripted-{channel}", protocol=MQTTv5
        )
        self._client.on_message = self._on_message
        self._client.on_subscribe = self._on_subscribe
        address = parse_address(broker)
        self._client.connect(address.host, address.port, clean_start=True)
        self._client.loop_start()
        self._client.subscribe(f"anabranch/v1/{channel}/+/+", qos=1)
        while not self._subscribed:
            time.sleep(0.01)

    def kinds(self, kind: str) -> list[bytes]:
        return [payload for k, payload in self.heard if k == kind]

    def tell(self, device: str, payload: bytes) -> None:
        self._client.publish(f"anabranch/v1/{self._channel}/{device}/ack", payload, qos=1)

    def ack(self, device: str, item_id: str, status: int) -> None:
        item = device_pb2.AckItem(id=item_id, reason="by script")
        item.status = status  # type: ignore[assignment] # a status that does not exist, too
        self.tell(device, device_pb2.Ack(items=[item]).SerializeToString())

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_subscribe(self, *_: object) -> None:
        self._subscribed = True

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        *_, device, kind = message.topic.split("/")
        payload = bytes(message.payload)
        self.heard.append((kind, payload))
        status = self.answer(kind, payload) if kind in {DEMONSTRATION, DRIFT} else None
        if status is not None:
            self.ack(device, payload.decode(), status)


@pytest.fixture
def channel() -> str:
    return f"link-{next(_CHANNELS)}"


@pytest.fixture
def cloud(broker: str, channel: str) -> Iterator[ScriptedCloud]:
    with closing(ScriptedCloud(broker, channel)) as scripted:
        yield scripted


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with closing(Outbox(tmp_path / "outbox.db", clock=time.time)) as box:
        yield box


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def make_uplink(
    broker: str,
    channel: str,
    outbox: Outbox,
    registry: CollectorRegistry | None = None,
    keepalive_s: int = 30,
) -> Uplink:
    return Uplink(
        channel=channel,
        device="lamp-1",
        agent_version="0.1.0",
        address=parse_address(broker),
        outbox=outbox,
        in_service=lambda: InService("d" * 64, 3),
        metrics=LinkMetrics(registry or CollectorRegistry()),
        clock=time.time,
        random=Random(0),
        policy=QUICK,
        keepalive_s=keepalive_s,
    )


@pytest.fixture
def uplink(
    broker: str, channel: str, outbox: Outbox, registry: CollectorRegistry
) -> Iterator[Uplink]:
    link = make_uplink(broker, channel, outbox, registry)
    link.start()
    assert link.wait_connected(20)
    yield link
    link.stop(0.1)


def put(outbox: Outbox, name: str, kind: str = DEMONSTRATION) -> None:
    outbox.put(kind, name, name.encode())  # the scripted cloud takes the payload for the id


def test_an_item_leaves_only_on_the_clouds_word(
    cloud: ScriptedCloud, outbox: Outbox, uplink: Uplink, eventually: Eventually
) -> None:
    put(outbox, "a")
    put(outbox, "b", DRIFT)
    uplink.wake()
    eventually(lambda: cloud.kinds(DEMONSTRATION).count(b"a") >= 3)  # PUBACKs did not satisfy it
    assert {i.id for i in outbox.pending(9)} == {"a", "b"}
    cloud.answer = lambda _kind, _payload: STORED
    eventually(lambda: outbox.pending(9) == [])
    assert b"b" in cloud.kinds(DRIFT)


def test_metrics_count_what_waits_is_sent_and_acknowledged(
    broker: str,
    channel: str,
    cloud: ScriptedCloud,
    outbox: Outbox,
    registry: CollectorRegistry,
    eventually: Eventually,
) -> None:
    def gauge(state: str) -> float | None:
        return registry.get_sample_value("anabranch_outbox_demonstrations", {"state": state})

    for n in range(6):
        put(outbox, f"d-{n}")
    put(outbox, "report", DRIFT)
    link = make_uplink(broker, channel, outbox, registry)
    assert (gauge("waiting"), gauge("in_flight")) == (6, 0)
    link.start()
    eventually(lambda: gauge("in_flight"))
    cloud.answer = lambda _k, payload: (
        device_pb2.ACK_STATUS_REJECTED if payload == b"d-5" else STORED
    )
    acknowledged = "anabranch_demonstrations_acknowledged_total"
    eventually(lambda: registry.get_sample_value(acknowledged) == 5)
    eventually(lambda: (gauge("waiting"), gauge("in_flight"), gauge("rejected")) == (0, 0, 1))
    sent = registry.get_sample_value("anabranch_demonstrations_sent_total")
    assert sent is not None
    assert sent >= 6
    link.stop(0.1)


def test_a_rejected_item_is_set_aside_and_sent_no_more(
    cloud: ScriptedCloud, outbox: Outbox, uplink: Uplink, eventually: Eventually
) -> None:
    cloud.answer = lambda _kind, payload: (
        device_pb2.ACK_STATUS_REJECTED if payload == b"bad" else STORED
    )
    put(outbox, "bad")
    put(outbox, "good")
    uplink.wake()
    eventually(lambda: outbox.counts().waiting == 0)
    (rejected,) = outbox.rejected(9)
    assert (rejected.id, rejected.reason) == ("bad", "by script")


def test_answers_that_make_no_sense_change_nothing(
    cloud: ScriptedCloud, outbox: Outbox, uplink: Uplink, eventually: Eventually
) -> None:
    put(outbox, "a")
    uplink.wake()
    eventually(lambda: cloud.kinds(DEMONSTRATION))
    cloud.tell("lamp-1", b"\xff\xff no protobuf")
    cloud.ack("lamp-1", "never sent", device_pb2.ACK_STATUS_STORED)
    cloud.ack("lamp-1", "a", 99)
    cloud.ack("lamp-2", "a", device_pb2.ACK_STATUS_STORED)  # meant for another device
    sent = len(cloud.kinds(DEMONSTRATION))
    eventually(lambda: len(cloud.kinds(DEMONSTRATION)) > sent)
    assert [i.id for i in outbox.pending(9)] == ["a"]
    assert uplink.connected


def test_birth_says_what_serves_and_comes_again_when_that_changes(
    cloud: ScriptedCloud, uplink: Uplink, eventually: Eventually
) -> None:
    eventually(lambda: cloud.kinds("birth"))
    birth = device_pb2.Birth.FromString(cloud.kinds("birth")[0])
    assert (birth.device, birth.student, birth.release) == ("lamp-1", "d" * 64, 3)
    assert birth.agent_version == "0.1.0"
    uplink.announce()
    eventually(lambda: len(cloud.kinds("birth")) == 2)
    assert device_pb2.Birth.FromString(cloud.kinds("birth")[1]).session == birth.session


def test_a_polite_stop_sends_what_waits_and_says_death(
    broker: str, channel: str, cloud: ScriptedCloud, outbox: Outbox, eventually: Eventually
) -> None:
    cloud.answer = lambda _kind, _payload: STORED
    link = make_uplink(broker, channel, outbox)
    link.start()
    assert link.wait_connected(20)
    for n in range(50):
        put(outbox, f"d-{n}")
    link.stop(20)
    assert outbox.counts().waiting == 0
    eventually(lambda: cloud.kinds("death"))
    (death,) = cloud.kinds("death")
    birth = device_pb2.Birth.FromString(cloud.kinds("birth")[0])
    assert device_pb2.Death.FromString(death).session == birth.session
    assert not link.connected


def test_stopping_does_not_wait_for_a_cloud_that_is_away(
    broker: str, channel: str, outbox: Outbox
) -> None:
    put(outbox, "a")
    link = make_uplink(broker, channel, outbox)
    link.start()
    assert link.wait_connected(20)
    link.stop(0.2)
    assert outbox.counts().waiting == 1


def test_stopping_ends_a_link_that_never_found_a_broker(
    channel: str, outbox: Outbox, free_port: Callable[[], int]
) -> None:
    link = make_uplink(f"127.0.0.1:{free_port()}", channel, outbox)
    link.start()
    link.wake()
    assert not link.wait_connected(0.3)
    link.stop(0.1)


def test_sigkill_of_a_device_makes_the_broker_publish_its_death(
    broker: str, channel: str, cloud: ScriptedCloud, tmp_path: Path, eventually: Eventually
) -> None:
    program = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_uplink import make_uplink, Outbox
outbox = Outbox(Path({str(tmp_path)!r}, "o.db"), clock=time.time)
link = make_uplink({broker!r}, {channel!r}, outbox)
link.start()
time.sleep(60)
"""

    def live() -> None:
        births, deaths = len(cloud.kinds("birth")), len(cloud.kinds("death"))
        with subprocess.Popen([sys.executable, "-c", program]) as process:
            eventually(lambda: len(cloud.kinds("birth")) > births)
            process.send_signal(signal.SIGKILL)
        eventually(lambda: len(cloud.kinds("death")) > deaths)

    live()
    live()
    births = [device_pb2.Birth.FromString(b).session for b in cloud.kinds("birth")]
    deaths = [device_pb2.Death.FromString(d).session for d in cloud.kinds("death")]
    assert births == deaths
    assert births[0] < births[1]


def test_a_disk_that_fails_does_not_end_the_link(
    cloud: ScriptedCloud,
    outbox: Outbox,
    uplink: Uplink,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge.link.uplink._DISK_RETRY_S", 0.05)
    cloud.answer = lambda _kind, _payload: STORED
    failures = count()
    stored = outbox.stored

    def failing(ids: list[str]) -> object:
        if next(failures) < 3:
            msg = "disk is full"
            raise StorageError(msg)
        return stored(ids)

    monkeypatch.setattr(outbox, "stored", failing)
    put(outbox, "a")
    uplink.wake()
    eventually(lambda: outbox.counts().waiting == 0)
    assert next(failures) > 3
    assert uplink.connected


def test_a_device_with_a_full_disk_still_delivers_its_evidence(
    broker: str, channel: str, cloud: ScriptedCloud, outbox: Outbox, eventually: Eventually
) -> None:
    put(outbox, "a")
    outbox._db.execute("PRAGMA query_only=ON")  # SQLite then refuses every write as on a bad disk
    link = make_uplink(broker, channel, outbox)
    link.start()
    eventually(lambda: b"a" in cloud.kinds(DEMONSTRATION))
    birth = device_pb2.Birth.FromString(cloud.kinds("birth")[0])
    assert birth.session > 0
    cloud.answer = lambda _kind, _payload: STORED
    outbox._db.execute("PRAGMA query_only=OFF")
    eventually(lambda: outbox.counts().waiting == 0)
    link.stop(0.1)


def test_a_broker_that_hangs_is_noticed_and_found_again(
    channel: str,
    outbox: Outbox,
    tmp_path: Path,
    free_port: Callable[[], int],
    eventually: Eventually,
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    program = f"""
from pathlib import Path
from cloud.broker import EmbeddedBroker
EmbeddedBroker(listen={listen!r}, workdir=Path({str(tmp_path)!r})).run_forever()
"""
    link = make_uplink(listen, channel, outbox, keepalive_s=1)
    link.start()  # before the broker
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            eventually(lambda: link.connected)
            process.send_signal(signal.SIGSTOP)
            eventually(lambda: not link.connected)
            process.send_signal(signal.SIGCONT)
            eventually(lambda: link.connected)
        finally:
            process.kill()
    link.stop(0.1)
