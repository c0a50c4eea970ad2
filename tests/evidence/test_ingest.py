"""The ingest against a real broker: what it takes, what it refuses, and what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from random import Random
from typing import TYPE_CHECKING

import pytest
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from prometheus_client import CollectorRegistry, generate_latest

from cloud.evidence.ingest import Ingest
from cloud.evidence.metrics import IngestMetrics
from edge.link.address import parse_address
from edge.link.outbox import MAX_PAYLOAD
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from cloud.evidence.store import EvidenceStore

Eventually = Callable[[Callable[[], object]], None]
Demonstrate = Callable[..., device_pb2.Demonstration]
ReportDrift = Callable[..., device_pb2.DriftReport]


class RawDevice:
    """A device without an outbox, free to publish anything; it hears its acknowledgements."""

    def __init__(self, broker: str, channel: str = "home", device: str = "lamp-1") -> None:
        self.acks: list[device_pb2.AckItem] = []
        self._base = f"anabranch/v1/{channel}/{device}"
        ready = threading.Event()
        self._client = Client(
            CallbackAPIVersion.VERSION2, client_id=f"raw-{channel}-{device}", protocol=MQTTv5
        )
        self._client.on_subscribe = lambda *_: ready.set()
        self._client.on_message = self._on_message
        address = parse_address(broker)
        self._client.connect(address.host, address.port, clean_start=True)
        self._client.loop_start()
        self._client.subscribe(f"{self._base}/ack", qos=1)
        assert ready.wait(20)

    def say(self, kind: str, payload: bytes) -> None:
        self.publish(f"{self._base}/{kind}", payload)

    def publish(self, topic: str, payload: bytes) -> None:
        self._client.publish(topic, payload, qos=1).wait_for_publish(20)

    def answer(self, item_id: str) -> device_pb2.AckItem | None:
        return next((a for a in reversed(self.acks) if a.id == item_id), None)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        self.acks.extend(device_pb2.Ack.FromString(bytes(message.payload)).items)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def ingest(broker: str, store: EvidenceStore, registry: CollectorRegistry) -> Iterator[Ingest]:
    running = Ingest(
        address=parse_address(broker),
        store=store,
        metrics=IngestMetrics(registry, channels=["home"]),
        random=Random(),
    )
    running.start()
    assert running.wait_connected(20)
    yield running
    running.stop()
    assert not running.connected


@pytest.fixture
def device(broker: str, ingest: Ingest) -> Iterator[RawDevice]:
    assert ingest.connected
    with closing(RawDevice(broker)) as raw:
        yield raw


@pytest.fixture
def counted(registry: CollectorRegistry) -> Callable[..., float]:
    def value(name: str, **labels: str) -> float:
        return registry.get_sample_value(f"anabranch_{name}", {"channel": "home", **labels}) or 0

    return value


Counted = Callable[..., float]


def test_evidence_is_stored_and_then_acknowledged(
    device: RawDevice,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    report_drift: ReportDrift,
    eventually: Eventually,
    counted: Counted,
) -> None:
    demonstration, report = demonstrate(), report_drift()
    device.say("demonstration", demonstration.SerializeToString())
    device.say("drift", report.SerializeToString())
    eventually(lambda: device.answer(demonstration.id) and device.answer(report.id))
    assert {a.status for a in device.acks} == {device_pb2.ACK_STATUS_STORED}
    assert store.demonstrations("home") == [demonstration]
    assert store.drift_reports("home") == [report]
    assert counted("demonstrations_stored_total") == 1
    assert counted("drift_reports_total", kind="concept") == 1


def test_a_duplicate_is_acknowledged_and_not_stored_again(
    device: RawDevice,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    eventually: Eventually,
    counted: Counted,
) -> None:
    message = demonstrate()
    for _ in range(3):
        device.say("demonstration", message.SerializeToString())
    eventually(lambda: len(device.acks) == 3)
    assert {a.status for a in device.acks} == {device_pb2.ACK_STATUS_STORED}
    assert store.demonstrations("home") == [message]
    assert counted("demonstrations_stored_total") == 1
    assert counted("demonstrations_duplicate_total") == 2


@pytest.mark.parametrize("kind", ["birth", "death", "demonstration", "drift"])
def test_malformed_protobuf_is_counted_and_the_ingest_goes_on(
    device: RawDevice,
    demonstrate: Demonstrate,
    eventually: Eventually,
    counted: Counted,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    payloads = [b"", b"\xff\xff\xff no protobuf", b"\x0a\x7fcut"]
    for payload in payloads:
        device.say(kind, payload)
    eventually(lambda: counted("messages_rejected_total", reason="malformed") == len(payloads))
    for payload in payloads:
        assert f"refused {len(payload)} bytes on anabranch/v1/home/lamp-1/{kind}" in caplog.text
    good = demonstrate()
    device.say("demonstration", good.SerializeToString())
    eventually(lambda: device.answer(good.id))
    assert [a.id for a in device.acks] == [good.id], "nobody knows which item to answer for"


def test_a_cut_message_is_rejected_by_the_id_at_its_front(
    device: RawDevice, demonstrate: Demonstrate, eventually: Eventually, counted: Counted
) -> None:
    message = demonstrate()
    device.say("demonstration", message.SerializeToString()[:-3])
    eventually(lambda: device.answer(message.id))
    answer = device.answer(message.id)
    assert answer is not None
    assert answer.status == device_pb2.ACK_STATUS_REJECTED
    assert "not a demonstration" in answer.reason
    assert counted("messages_rejected_total", reason="malformed") == 1


def test_a_demonstration_of_a_megabyte_is_rejected_and_the_connection_stays(
    device: RawDevice,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    eventually: Eventually,
    counted: Counted,
) -> None:
    large, small = demonstrate(answer="x" * 1_000_000), demonstrate()
    device.say("demonstration", large.SerializeToString())
    device.say("demonstration", small.SerializeToString())
    eventually(lambda: device.answer(large.id) and device.answer(small.id))
    answer = device.answer(large.id)
    assert answer is not None
    assert answer.status == device_pb2.ACK_STATUS_REJECTED
    assert str(MAX_PAYLOAD) in answer.reason
    assert counted("messages_rejected_total", reason="too_large") == 1
    assert store.demonstrations("home") == [small]


def test_an_impostor_is_told_no_and_nothing_is_stored(
    broker: str,
    ingest: Ingest,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    eventually: Eventually,
    counted: Counted,
) -> None:
    message = demonstrate(device="lamp-1")
    with closing(RawDevice(broker, device="thief")) as thief:
        thief.say("demonstration", message.SerializeToString())
        eventually(lambda: thief.answer(message.id))
        answer = thief.answer(message.id)
        assert answer is not None
        assert answer.status == device_pb2.ACK_STATUS_REJECTED
        assert "lamp-1" in answer.reason
        birth = device_pb2.Birth(channel="home", device="lamp-1", session=9)
        thief.say("birth", birth.SerializeToString())
        eventually(lambda: counted("messages_rejected_total", reason="impostor") == 2)
    assert ingest.connected
    assert store.demonstrations("home") == []
    assert store.devices("home") == []


def test_evidence_without_content_is_rejected_as_invalid(
    device: RawDevice, demonstrate: Demonstrate, eventually: Eventually, counted: Counted
) -> None:
    empty = demonstrate()
    empty.ClearField("correction")
    device.say("demonstration", empty.SerializeToString())
    eventually(lambda: device.answer(empty.id))
    answer = device.answer(empty.id)
    assert answer is not None
    assert answer.status == device_pb2.ACK_STATUS_REJECTED
    assert counted("messages_rejected_total", reason="invalid") == 1


def test_numbers_that_no_database_holds_are_malformed(
    device: RawDevice, store: EvidenceStore, eventually: Eventually, counted: Counted
) -> None:
    birth = device_pb2.Birth(channel="home", device="lamp-1", session=2**64 - 1)
    device.say("birth", birth.SerializeToString())
    eventually(lambda: counted("messages_rejected_total", reason="malformed") == 1)
    assert store.devices("home") == []


def test_wrong_topics_and_strange_channels_share_one_label(
    device: RawDevice,
    store: EvidenceStore,
    demonstrate: Demonstrate,
    eventually: Eventually,
    registry: CollectorRegistry,
) -> None:
    device.publish("anabranch/v1/no name/lamp-1/birth", b"x")
    wrong = {"channel": "other", "reason": "wrong_topic"}
    name = "anabranch_messages_rejected_total"
    eventually(lambda: registry.get_sample_value(name, wrong) == 1)
    strange = demonstrate(channel="attic")
    device.publish("anabranch/v1/attic/lamp-1/demonstration", strange.SerializeToString())
    stored = "anabranch_demonstrations_stored_total"
    eventually(lambda: registry.get_sample_value(stored, {"channel": "other"}) == 1)
    assert store.demonstrations("attic") == [strange]
    assert b"attic" not in generate_latest(registry)


def test_births_and_deaths_are_kept_and_counted(
    device: RawDevice, store: EvidenceStore, eventually: Eventually, counted: Counted
) -> None:
    birth = device_pb2.Birth(channel="home", device="lamp-1", session=2, student="s", release=1)
    device.say("birth", birth.SerializeToString())
    eventually(lambda: counted("devices_online") == 1)
    old = device_pb2.Death(channel="home", device="lamp-1", session=1)
    device.say("death", old.SerializeToString())
    device.say("birth", birth.SerializeToString())
    assert counted("devices_online") == 1
    last = device_pb2.Death(channel="home", device="lamp-1", session=2)
    device.say("death", last.SerializeToString())
    eventually(lambda: counted("devices_online") == 0)
    assert [d.device for d in store.devices("home")] == ["lamp-1"]


def test_a_full_disk_gives_no_answer_until_there_is_room(
    device: RawDevice,
    full_disk: Callable[[], AbstractContextManager[None]],
    store: EvidenceStore,
    demonstrate: Demonstrate,
    eventually: Eventually,
    counted: Counted,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cloud.evidence.ingest._DISK_PAUSE_S", 0.05)
    message = demonstrate(answer="x" * 60_000)
    with full_disk():
        device.say("demonstration", message.SerializeToString())
        eventually(lambda: counted("messages_rejected_total", reason="storage") == 1)
        assert device.acks == []
        assert store.demonstrations("home") == []
    device.say("demonstration", message.SerializeToString())
    eventually(lambda: device.answer(message.id))
    assert store.demonstrations("home") == [message]


def test_stopping_stores_and_acknowledges_what_has_arrived(
    broker: str, store: EvidenceStore, demonstrate: Demonstrate, eventually: Eventually
) -> None:
    ingest = Ingest(
        address=parse_address(broker),
        store=store,
        metrics=IngestMetrics(CollectorRegistry(), channels=[]),
        random=Random(),
    )
    ingest.start()
    assert ingest.wait_connected(20)
    messages = [demonstrate() for _ in range(50)]
    with closing(RawDevice(broker)) as raw:
        for message in messages:
            raw.say("demonstration", message.SerializeToString())
        ingest.stop()
        stored = {m.id for m in store.demonstrations("home")}
        eventually(lambda: {a.id for a in raw.acks} == stored)
