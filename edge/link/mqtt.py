"""One MQTT 5 connection that keeps itself up, in one thread.

Everything of a connection happens in the link's own thread: reading, writing, callbacks, and the
work beside them. So nothing is published from inside a paho callback, and nothing needs a lock.
paho's own reconnecting has no jitter and carries messages over; here every connection gets a fresh
client with a clean start, and retries use full jitter.
"""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from edge.link.policy import full_jitter
from protos.errors import AnabranchError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from paho.mqtt.client import MQTTMessageInfo

    from edge.link.address import Address

_LOG = logging.getLogger(__name__)
_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 10.0
_GOODBYE_S = 1.0
_RETRY_BASE_S = 0.5
_RETRY_CAP_S = 30.0
# A connection that lasted this long was a good one: the next retry begins at the base again.
_GOOD_S = 10.0
_QOS = 1


class Message(NamedTuple):
    """A topic and what is published on it."""

    topic: str
    payload: bytes


class MqttLink(ABC):
    """Keeps a connection to the broker; subclasses say what happens on it.

    The hooks (methods that begin with ``on_``, and :meth:`work`) run in the link's thread. An
    exception in one of them is logged and costs the connection, never the thread.

    Args:
        address: the broker's MQTT 5 listener.
        client_id: unique on the broker: a second client of this name takes the connection over.
        subscriptions: topic filters; the link is up when the broker has granted all of them.
        random: for the jitter of retries.
        keepalive_s: seconds; the broker publishes the will after one and a half of it in silence.
        tls: asked at each connection for what to show and whom to believe; None: without TLS.
    """

    def __init__(
        self,
        *,
        address: Address,
        client_id: str,
        subscriptions: Sequence[str],
        random: Random,
        keepalive_s: int = 30,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self._address = address
        self._tls = tls
        self._client_id = client_id
        self._subscriptions = tuple(subscriptions)
        self._random = random
        self._keepalive_s = keepalive_s
        self._client: Client | None = None
        self._up = threading.Event()
        self._stop = threading.Event()
        self._stop_at = 0.0
        self._again = threading.Event()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self._wake_out.setblocking(False)  # noqa: FBT003 - the standard library's signature
        self._thread = threading.Thread(target=self._run, name=f"mqtt-{client_id}", daemon=True)

    @property
    def connected(self) -> bool:
        """Whether the connection is up and every subscription granted."""
        return self._up.is_set()

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the link is up; False if it is not after ``timeout_s`` seconds."""
        return self._up.wait(timeout_s)

    def start(self) -> None:
        """Connect in the background, and again whenever the connection is lost."""
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Finish what is under way for at most ``timeout_s`` seconds, say goodbye, and end."""
        self._stop_at = time.monotonic() + timeout_s
        self._stop.set()
        self.wake()
        if self._thread.is_alive():
            self._thread.join()
        self._wake_in.close()
        self._wake_out.close()

    def wake(self) -> None:
        """Have :meth:`work` called soon. From any thread, at any time."""
        with suppress(OSError):  # already full of wake-ups, or stopped
            self._wake_in.send(b"\0")

    def reconnect(self) -> None:
        """Make the connection anew soon, with what ``tls`` gives then. From any thread."""
        self._again.set()
        self.wake()

    def publish(self, message: Message) -> MQTTMessageInfo | None:
        """Publish at QoS 1, from a hook only; None if the connection is lost."""
        if self._client is None:
            return None
        info = self._client.publish(message.topic, message.payload, qos=_QOS)
        return info if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS else None

    @abstractmethod
    def on_will(self) -> Message | None:
        """Before each connection: what the broker shall publish if it is lost."""

    @abstractmethod
    def on_up(self) -> None:
        """The link is up."""

    @abstractmethod
    def on_message(self, message: Message) -> None:
        """A message has arrived on one of the subscriptions. Publish nothing here."""

    @abstractmethod
    def work(self) -> float | None:
        """Do what is due; return the seconds until there is more, or None to wait for a wake-up."""

    @abstractmethod
    def on_goodbye(self) -> Message | None:
        """The link stops in good order: what to publish last."""

    def finished(self) -> bool:
        """Whether nothing is left that :meth:`stop` should wait for."""
        return True

    def _run(self) -> None:
        attempt = 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._connection()
            except (OSError, AnabranchError) as error:
                _LOG.warning("no connection to the broker at %s: %s", self._address, error)
            except Exception:  # noqa: BLE001 - a thread that ended here would silence the device
                _LOG.exception("the link to %s failed; connecting again", self._address)
            attempt = 0 if time.monotonic() - began > _GOOD_S else attempt + 1
            self._stop.wait(
                full_jitter(attempt, base_s=_RETRY_BASE_S, cap_s=_RETRY_CAP_S, random=self._random)
            )

    def _connection(self) -> None:
        """One connection, from CONNECT to its end."""
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            protocol=MQTTv5,
            reconnect_on_failure=False,
        )
        client.connect_timeout = _CONNECT_TIMEOUT_S
        if self._tls is not None:
            self._again.clear()
            client.tls_set_context(self._tls())
        client.on_socket_open = lambda _c, _u, sock: _send_at_once(sock)
        will = self.on_will()
        if will is not None:
            client.will_set(will.topic, will.payload, qos=_QOS)
        answers: dict[str, Any] = {}
        client.on_connect = lambda _c, _u, _f, code, _p: answers.setdefault("connect", [code])
        client.on_subscribe = lambda _c, _u, _m, codes, _p: answers.setdefault("subscribe", codes)
        client.on_message = lambda _c, _u, m: self._deliver(m)
        with selectors.DefaultSelector() as selector:
            try:
                client.connect(
                    self._address.host, self._address.port, self._keepalive_s, clean_start=True
                )
                selector.register(self._wake_out, selectors.EVENT_READ)
                self._await_answer(client, selector, answers, "connect")
                client.subscribe([(t, _QOS) for t in self._subscriptions])
                self._await_answer(client, selector, answers, "subscribe")
                self._client = client
                self._up.set()
                _LOG.info("connected to the broker at %s", self._address)
                self.on_up()
                self._serve(client, selector)
                self._goodbye(client, selector)
            finally:
                self._up.clear()
                self._client = None
                sock = client.socket()
                if sock is not None:
                    sock.close()

    def _await_answer(
        self,
        client: Client,
        selector: selectors.BaseSelector,
        answers: dict[str, Any],
        what: str,
    ) -> None:
        self._pump_until(client, selector, lambda: what in answers, _ANSWER_TIMEOUT_S)
        if what not in answers:
            msg = f"no answer to {what}"
            raise UnavailableError(msg)
        refused = [str(code) for code in answers[what] if code.is_failure]
        if refused:
            msg = f"{what} refused: {', '.join(refused)}"
            raise UnavailableError(msg)

    def _serve(self, client: Client, selector: selectors.BaseSelector) -> None:
        while True:
            wait = self.work()
            if self._again.is_set():
                self._again.clear()
                return
            if self._stop.is_set() and (self.finished() or time.monotonic() >= self._stop_at):
                return
            # paho sends its pings from the pump.
            at_most = self._keepalive_s / 4
            if self._stop.is_set():
                at_most = min(at_most, max(0.0, self._stop_at - time.monotonic()))
            self._pump(client, selector, at_most if wait is None else min(wait, at_most))

    def _goodbye(self, client: Client, selector: selectors.BaseSelector) -> None:
        last = self.on_goodbye()
        if last is not None:
            info = self.publish(last)
            if info is not None:
                self._pump_until(client, selector, info.is_published, _GOODBYE_S)
        client.disconnect()

    def _pump_until(
        self,
        client: Client,
        selector: selectors.BaseSelector,
        done: Callable[[], bool],
        timeout_s: float,
    ) -> None:
        end = time.monotonic() + timeout_s
        while not done() and (left := end - time.monotonic()) > 0:
            self._pump(client, selector, left)

    def _pump(self, client: Client, selector: selectors.BaseSelector, timeout_s: float) -> None:
        """Wait for the network or a wake-up, and let paho do its part."""
        sock = client.socket()
        if sock is None:
            msg = "the broker closed the connection"
            raise UnavailableError(msg)
        write = selectors.EVENT_WRITE if client.want_write() else 0
        selector.register(sock, selectors.EVENT_READ | write)
        try:
            ready = {key.fileobj: mask for key, mask in selector.select(timeout_s)}
        finally:
            selector.unregister(sock)
        if self._wake_out in ready:
            self._wake_out.recv(4096)
        if ready.get(sock, 0) & selectors.EVENT_READ:
            client.loop_read()
            # What TLS has read ahead of us, no selector tells.
            while _read_ahead(client):
                client.loop_read()
        if ready.get(sock, 0) & selectors.EVENT_WRITE:
            client.loop_write()
        client.loop_misc()

    def _deliver(self, message: MQTTMessage) -> None:
        self.on_message(Message(message.topic, bytes(message.payload)))


def _read_ahead(client: Client) -> bool:
    sock = client.socket()
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0


def _send_at_once(sock: object) -> None:
    # Small packets go both ways: else each waits some 40 ms for the other side's TCP ack.
    if isinstance(sock, socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
