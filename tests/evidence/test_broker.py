"""The embedded broker as a process of its own and as a child."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from cloud.broker import MAX_PAYLOAD, EmbeddedBroker
from edge.link.address import Address, parse_address
from protos.errors import InvalidInputError, UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

Eventually = Callable[[Callable[[], object]], None]


def accepts(address: Address) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


def run_forever(listen: str, workdir: Path) -> subprocess.Popen[bytes]:
    program = f"""
from pathlib import Path
from cloud.broker import EmbeddedBroker
EmbeddedBroker(listen={listen!r}, workdir=Path({str(workdir)!r})).run_forever()
"""
    return subprocess.Popen([sys.executable, "-c", program])


def connected_client(address: Address, name: str) -> Client:
    """Connect a client, so that the port has connections that linger when the broker dies."""
    up = threading.Event()
    client = Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTv5)
    client.on_connect = lambda *_: up.set()
    client.connect(address.host, address.port, clean_start=True)
    client.loop_start()
    assert up.wait(20)
    return client


def test_a_broker_ends_at_once_and_its_port_can_be_used_again(
    tmp_path: Path, free_port: Callable[[], int], eventually: Eventually
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    address = parse_address(listen)
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 0), (signal.SIGTERM, 0)):
        with run_forever(listen, tmp_path) as process:
            eventually(lambda: accepts(address))
            client = connected_client(address, number.name)
            process.send_signal(number)
            assert process.wait(20) == code
        assert not accepts(address), "no child goes on"
        client.loop_stop()


def test_the_child_of_a_killed_process_does_not_go_on(
    tmp_path: Path, free_port: Callable[[], int], eventually: Eventually
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    address = parse_address(listen)
    program = f"""
import os, pathlib, signal
from cloud.broker import EmbeddedBroker
EmbeddedBroker(listen={listen!r}, workdir=pathlib.Path({str(tmp_path)!r})).start()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    eventually(lambda: not accepts(address))
    embedded = EmbeddedBroker(listen=listen, workdir=tmp_path)
    embedded.start()
    assert accepts(address)
    embedded.stop()
    embedded.stop()
    assert not accepts(address)


def test_a_port_in_use_is_a_clear_error(broker: str, tmp_path: Path) -> None:
    embedded = EmbeddedBroker(listen=broker, workdir=tmp_path)
    with pytest.raises(UnavailableError, match=f"cannot listen on {broker}"):
        embedded.start()
    with run_forever(broker, tmp_path) as process:
        assert process.wait(20) == 1


@pytest.mark.parametrize(
    "text", ["1883", ":1883", "host:", "host:0", "host:70000", "::1:1883", "h:x"]
)
def test_what_is_no_address_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="write host:port"):
        EmbeddedBroker(listen=text, workdir=tmp_path)


def test_a_payload_of_a_megabyte_passes(broker: str) -> None:
    arrived, subscribed = threading.Event(), threading.Event()
    client = connected_client(parse_address(broker), "large")
    payload = bytes(MAX_PAYLOAD // 2)

    def on_message(_client: Client, _data: object, message: MQTTMessage) -> None:
        if message.payload == payload:
            arrived.set()

    client.on_message = on_message
    client.on_subscribe = lambda *_: subscribed.set()
    client.subscribe("large", qos=1)
    assert subscribed.wait(20)
    client.publish("large", payload, qos=1)
    assert arrived.wait(20)
    client.disconnect()
    client.loop_stop()
