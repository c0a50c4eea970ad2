"""Mosquitto as deploy/ configures it: certificates, the access list, and what a reload changes."""

from __future__ import annotations

import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from prometheus_client import CollectorRegistry

from cloud.evidence.ingest import Ingest
from cloud.evidence.metrics import IngestMetrics
from cloud.evidence.store import EvidenceStore
from cloud.identity.broker_folder import access_list
from edge.identity.enroll import enroll
from edge.identity.tls import client_context
from edge.link.address import Address
from edge.link.metrics import LinkMetrics
from edge.link.outbox import DEMONSTRATION, Outbox
from edge.link.uplink import InService, Uplink
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge.identity.files import Identity
    from tests.identity.identity_cloud import Cloud
else:
    from identity_cloud import Cloud

Eventually = Callable[[Callable[[], object]], None]
CONFIG = Path(__file__).parents[2] / "deploy/mosquitto/mosquitto.conf"
MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin") or shutil.which("mosquitto")
NOT_AUTHORIZED = 0x87  # MQTT 5, section 3.4.2.1

pytestmark = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


class Broker:
    """Mosquitto with the configuration of deploy/, on a free port of loopback."""

    def __init__(self, cloud: Cloud, port: int, eventually: Eventually) -> None:
        folder = cloud.folder / "broker"
        text = CONFIG.read_text()
        assert "listener 8883\n" in text
        file = cloud.folder / "mosquitto.conf"
        file.write_text(
            text.replace("listener 8883", f"listener {port} 127.0.0.1").replace(
                "/var/lib/anabranch-broker", str(folder)
            )
            # As root it would become a user who may not enter pytest's folders.
            + "user root\n"
        )
        self.address = Address("127.0.0.1", port)
        self.folder = folder
        self._running = subprocess.Popen([str(MOSQUITTO), "-c", str(file)])
        eventually(self._listens)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(self.address) == 0

    def reload(self) -> None:
        self._running.send_signal(signal.SIGHUP)

    def close(self) -> None:
        self._running.terminate()
        self._running.wait()


class Raw:
    """A client that shows an identity and then does what it likes."""

    def __init__(self, broker: Broker, pair: Path, authorities: bytes, name: str = "any") -> None:
        self.up = threading.Event()
        self.down = threading.Event()
        self.heard: list[str] = []
        self._answers: dict[int, int] = {}
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTv5)
        self._client.reconnect_delay_set(60, 60)
        self._client.tls_set_context(client_context(pair=pair, authorities=authorities))
        self._client.on_connect = lambda *_: self.up.set()
        self._client.on_disconnect = lambda *_: self.down.set()
        self._client.on_publish = lambda _c, _u, mid, code, _p: self._answers.update(
            {mid: code.value}
        )
        self._client.on_message = lambda _c, _u, message: self.heard.append(message.topic)
        self._client.connect(*broker.address)
        self._client.loop_start()

    def publish(self, topic: str, payload: bytes = b"x") -> int:
        """The broker's reason code."""
        mid = self._client.publish(topic, payload, qos=1).mid
        end = time.monotonic() + 20
        while mid not in self._answers:
            assert time.monotonic() < end
            time.sleep(0.01)
        return self._answers[mid]

    def subscribe(self, topic: str) -> None:
        self._client.subscribe(topic, qos=1)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(tmp_path / "cloud") as running:
        yield running


@pytest.fixture
def broker(cloud: Cloud, free_port: Callable[[], int], eventually: Eventually) -> Iterator[Broker]:
    with closing(Broker(cloud, free_port(), eventually)) as running:
        yield running


@pytest.fixture
def store(cloud: Cloud) -> EvidenceStore:
    return EvidenceStore(cloud.engine, clock=time.time)


@pytest.fixture
def ingest(cloud: Cloud, broker: Broker, store: EvidenceStore) -> Iterator[Ingest]:
    running = Ingest(
        address=broker.address,
        store=store,
        metrics=IngestMetrics(cloud.metrics, channels=["home"]),
        random=Random(),
        channel="home",
        check_sender=cloud.security.keeper.check_name,
        tls=cloud.security.broker_context,
    )
    running.start()
    assert running.wait_connected(20)
    yield running
    running.stop()


class Device:
    """A device's outbox and uplink."""

    def __init__(self, identity: Identity, broker: Broker, channel: str = "home") -> None:
        self.outbox = Outbox(identity.folder / "outbox.sqlite", clock=time.time)
        self.channel = channel
        self.name = identity.device
        self.uplink = Uplink(
            channel=channel,
            device=identity.device,
            agent_version="0.1.0",
            address=broker.address,
            outbox=self.outbox,
            in_service=lambda: InService("d" * 64, 0),
            metrics=LinkMetrics(CollectorRegistry()),
            clock=time.time,
            random=Random(0),
            tls=lambda: client_context(pair=identity.file, authorities=identity.authorities),
        )
        self.uplink.start()

    def say(self, number: int, *, size: int = 10) -> device_pb2.Demonstration:
        message = device_pb2.Demonstration(
            id=f"01900000-0000-7000-8000-{number:012x}",
            channel=self.channel,
            device=self.name,
            student="d" * 64,
            created_ms=1_700_000_000_000,
            messages=[device_pb2.ChatMessage(role="user", content="lights on")],
            answer="x" * size,
            correction="{}",
            source=device_pb2.SOURCE_CORRECTION,
        )
        self.outbox.put(DEMONSTRATION, message.id, message.SerializeToString())
        self.uplink.wake()
        return message

    def close(self) -> None:
        self.uplink.stop(0.1)
        self.outbox.close()


def raw(cloud: Cloud, broker: Broker, identity: Identity) -> Raw:
    client = Raw(broker, identity.file, cloud.ca)
    assert client.up.wait(20)
    return client


def test_evidence_reaches_the_cloud_and_its_word_the_device(
    cloud: Cloud, broker: Broker, ingest: Ingest, store: EvidenceStore, eventually: Eventually
) -> None:
    assert ingest.connected
    with closing(Device(cloud.enrolled(), broker)) as device:
        # Many and large ones: TLS reads ahead of what a selector can tell.
        sent = [device.say(n, size=30_000) for n in range(1, 101)]
        eventually(lambda: device.outbox.counts().waiting == 0)
        assert device.outbox.counts().rejected == 0
        assert {m.id for m in store.demonstrations("home")} == {m.id for m in sent}
        eventually(lambda: store.devices("home"))
        assert store.devices("home")[0].online


def test_one_device_cannot_publish_as_another_or_hear_it(
    cloud: Cloud, broker: Broker, ingest: Ingest, store: EvidenceStore
) -> None:
    assert ingest.connected
    cloud.enrolled("lamp-2")
    impostor = device_pb2.Birth(channel="home", device="lamp-2", session=1)
    with closing(raw(cloud, broker, cloud.enrolled("lamp-1"))) as one:
        payload = impostor.SerializeToString()
        assert one.publish("anabranch/v1/home/lamp-2/birth", payload) == NOT_AUTHORIZED
        assert one.publish("anabranch/v1/home/lamp-2/ack", payload) == NOT_AUTHORIZED
        assert one.publish("anabranch/v1/home/lamp-1/ack", payload) == NOT_AUTHORIZED
        assert one.publish("anabranch/v1/home/lamp-1/other", payload) == NOT_AUTHORIZED
        one.subscribe("anabranch/v1/home/+/ack")
        one.subscribe("anabranch/v1/home/lamp-2/ack")
        one.subscribe("anabranch/v1/home/lamp-1/ack")
        # Its own topic it may use; what the content claims, the cloud refuses.
        assert one.publish("anabranch/v1/home/lamp-1/birth", payload) == 0
        cloud.security.broker_context()
        pair = cloud.folder / "identity" / "cloud.pem"
        ingest.stop()  # the broker takes a second client of this name for the same one
        with closing(Raw(broker, pair, cloud.ca)) as centre:
            assert centre.up.wait(20)
            assert centre.publish("anabranch/v1/home/lamp-2/ack") in (0, 0x10)
            assert centre.publish("anabranch/v1/home/lamp-1/ack") == 0
        end = time.monotonic() + 20
        while not one.heard and time.monotonic() < end:
            time.sleep(0.01)
        assert set(one.heard) == {"anabranch/v1/home/lamp-1/ack"}
    assert not store.devices("home")


def test_a_device_of_another_channel_is_refused_by_the_cloud(
    cloud: Cloud, broker: Broker, ingest: Ingest, store: EvidenceStore, eventually: Eventually
) -> None:
    assert ingest.connected
    identity = cloud.enrolled("desk", channel="office")
    with closing(Device(identity, broker, channel="home")) as device:
        device.say(1)
        eventually(lambda: device.uplink.held)
        assert "belongs to channel office, not home" in (device.uplink.held or "")
        assert device.outbox.counts().waiting == 1
    assert not store.demonstrations("home")


def test_after_a_revocation_nothing_is_taken_and_a_reload_shuts_the_broker(
    cloud: Cloud, broker: Broker, ingest: Ingest, store: EvidenceStore, eventually: Eventually
) -> None:
    assert ingest.connected
    identity = cloud.enrolled("lamp-1")
    with closing(Device(identity, broker)) as device:
        device.say(1)
        eventually(lambda: device.outbox.counts().waiting == 0)
        version = (broker.folder / "version").read_text()
        cloud.registry.revoke("lamp-1", reason="sold")
        eventually(lambda: (broker.folder / "version").read_text() != version)
        device.say(2)  # the connection is open, and the broker was not told yet
        eventually(lambda: device.uplink.held)
        assert "was revoked (sold)" in (device.uplink.held or "")
    with closing(raw(cloud, broker, identity)) as still_open:
        assert still_open.publish("anabranch/v1/home/lamp-1/birth") == 0
        broker.reload()
        eventually(lambda: still_open.publish("anabranch/v1/home/lamp-1/birth") == NOT_AUTHORIZED)
    refused = Raw(broker, identity.file, cloud.ca)
    assert refused.down.wait(20)  # by the list of revoked certificates
    assert not refused.up.is_set()
    refused.close()
    assert len(store.demonstrations("home")) == 1
    with closing(raw(cloud, broker, cloud.enrolled("lamp-2"))) as other:
        assert other.publish("anabranch/v1/home/lamp-2/birth") in (0, 0x10)


def test_the_new_connection_of_a_device_ends_the_one_that_a_thief_holds(
    cloud: Cloud, broker: Broker
) -> None:
    stolen = raw(cloud, broker, cloud.enrolled())
    identity, _ = enroll(
        cloud.folder / "devices" / "lamp-1",
        cloud=cloud.enrolment,
        token=cloud.registry.invite("lamp-1"),
        authorities=cloud.ca,
        again=True,
    )
    cloud.security.look()
    broker.reload()
    with closing(raw(cloud, broker, identity)) as rightful:
        assert stolen.down.wait(20)
        assert rightful.publish("anabranch/v1/home/lamp-1/birth") in (0, 0x10)
    stolen.close()


def speak(address: Address, context: ssl.SSLContext) -> None:
    """Shake hands and wait for a word: with TLS 1.3 a refusal comes after the handshake."""
    with (
        socket.create_connection(address, timeout=20) as connection,
        context.wrap_socket(connection, server_hostname=address.host) as tls,
    ):
        tls.sendall(b"\x10")
        tls.recv(1)


def test_without_a_certificate_of_ours_nobody_connects(
    cloud: Cloud, broker: Broker, tmp_path: Path
) -> None:
    with Cloud(tmp_path / "other") as other:
        stranger = other.enrolled()
        context = client_context(pair=stranger.file, authorities=cloud.ca)
        anonymous = ssl.create_default_context(cadata=cloud.ca.decode())
        for each in (context, anonymous):
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                speak(broker.address, each)


def test_a_link_connects_anew_with_another_certificate(
    cloud: Cloud, broker: Broker, ingest: Ingest, store: EvidenceStore, eventually: Eventually
) -> None:
    assert ingest.connected
    with closing(Device(cloud.enrolled(), broker)) as device:
        eventually(lambda: store.devices("home"))
        before = store.devices("home")[0].session
        device.uplink.reconnect()
        eventually(lambda: store.devices("home")[0].session > before)
        device.say(1)
        eventually(lambda: device.outbox.counts().waiting == 0)


def test_the_folder_is_written_only_where_it_has_changed(cloud: Cloud) -> None:
    folder = cloud.folder / "broker"

    def written() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}

    first = written()
    assert set(first) == {"ca.pem", "crl.pem", "acl", "server.pem", "version"}
    cloud.security.look()
    assert written() == first
    cloud.enrolled()
    cloud.security.look()
    assert written() == first  # the pattern holds for every device
    cloud.registry.revoke("lamp-1", reason="sold")
    cloud.security.look()
    changed = {name for name, at in written().items() if first[name] != at}
    assert changed == {"crl.pem", "acl", "version"}
    cloud.clock.ahead = 70 * 86400
    second = written()
    cloud.security.look()
    changed = {name for name, at in written().items() if second[name] != at}
    assert changed >= {"server.pem", "version"}
    (folder / "version").unlink()  # killed before it was written
    cloud.security.look()
    assert (folder / "version").exists()


def test_only_a_device_without_any_certificate_in_force_is_denied(cloud: Cloud) -> None:
    cloud.enrolled("lamp-1")
    cloud.enrolled("lamp-2")
    cloud.registry.revoke("lamp-1", reason="sold")
    cloud.registry.revoke("lamp-2", reason="sold")
    identity, _ = enroll(
        cloud.folder / "devices" / "lamp-2",
        cloud=cloud.enrolment,
        token=cloud.registry.invite("lamp-2"),
        authorities=cloud.ca,
        again=True,
    )
    assert identity.device == "lamp-2"
    text = access_list(cloud.registry.certified(), now=cloud.clock())
    assert "user lamp-1\ntopic deny #\n" in text
    assert "lamp-2" not in text
