"""The uplink: carries the outbox to the cloud over MQTT 5, and takes the cloud's word back.

Birth goes out whenever the link comes up, and again every minute: a cloud that was away then learns
of the device all the same, since no broker keeps anything for it. Death is the will.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.message import DecodeError

from edge.link.mqtt import Message, MqttLink
from edge.link.outbox import DEMONSTRATION, DRIFT, Outbox
from edge.link.policy import Flight, SendPolicy, answered, plan, reconnected
from protos.errors import StorageError
from protos.topics import topic
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random
    from ssl import SSLContext

    from edge.link.address import Address
    from edge.link.metrics import LinkMetrics

_LOG = logging.getLogger(__name__)
_BIRTH_EVERY_S = 60.0
_DISK_RETRY_S = 5.0
# What the cloud says when it takes no more, within reason.
_HOLD_MIN_S = 1.0
_HOLD_MAX_S = 3600.0
# Enough for the policy to find others when some items never get an answer.
_LOOKAHEAD = 2


class InService(NamedTuple):
    """The student that answers now: its digest, and the release's version (0 before the first)."""

    student: str
    release: int


class Uplink(MqttLink):
    """The uplink of one device.

    Args:
        channel: the device's channel.
        device: the device's id.
        agent_version: for births.
        address: the broker's MQTT 5 listener.
        outbox: what to send.
        in_service: asked at every birth.
        metrics: counts what is sent and acknowledged.
        clock: seconds since 1970.
        random: for the jitter of retries.
        policy: the sender's bounds.
        keepalive_s: seconds; the broker publishes the will after one and a half of it in silence.
        tls: see :class:`~edge.link.mqtt.MqttLink`.
    """

    def __init__(
        self,
        *,
        channel: str,
        device: str,
        agent_version: str,
        address: Address,
        outbox: Outbox,
        in_service: Callable[[], InService],
        metrics: LinkMetrics,
        clock: Callable[[], float],
        random: Random,
        policy: SendPolicy | None = None,
        keepalive_s: int = 30,
        tls: Callable[[], SSLContext] | None = None,
    ) -> None:
        self._channel = channel
        self._device = device
        self._agent_version = agent_version
        self._outbox = outbox
        self._in_service = in_service
        self._metrics = metrics
        self._clock = clock
        self._policy = policy or SendPolicy()
        self._topics = {
            k: topic(channel, device, k) for k in ("birth", "death", DEMONSTRATION, DRIFT)
        }
        self._session = 0
        self._flight = Flight()
        self._demonstrations_in_flight = 0
        self._answers: dict[str, device_pb2.AckItem] = {}
        self._send_at = 0.0
        self._birth_at = 0.0
        self._held_until = 0.0
        self._held_because = ""
        self._due = threading.Event()
        self._announce = threading.Event()
        super().__init__(
            address=address,
            client_id=f"anabranch-{channel}-{device}",
            subscriptions=[topic(channel, device, "ack")],
            random=random,
            keepalive_s=keepalive_s,
            tls=tls,
        )
        metrics.watch(lambda: outbox.counts(DEMONSTRATION), lambda: self._demonstrations_in_flight)

    def wake(self) -> None:
        """A new item is in the outbox: send it soon. From any thread."""
        self._due.set()
        super().wake()

    def announce(self) -> None:
        """Publish birth again soon: another student is in service. From any thread."""
        self._announce.set()
        super().wake()

    @property
    def held(self) -> str | None:
        """Why the cloud takes nothing from this device for now; None: it does."""
        return self._held_because if time.monotonic() < self._held_until else None

    def on_will(self) -> Message:
        """Death of the session that is about to begin."""
        try:
            self._session = self._outbox.next_session()
        except StorageError as error:
            # Evidence on a full disk is better off in the cloud: time makes the number grow, too.
            self._session = max(self._session + 1, int(self._clock() * 1000))
            _LOG.error("session %d is not kept: %s", self._session, error)
        return self.on_goodbye()

    def on_up(self) -> None:
        """Begin anew: what was in flight on the last connection may be lost."""
        self._flight = reconnected(self._flight)
        self._send_at = self._birth_at = 0.0

    def on_message(self, message: Message) -> None:
        """Keep an acknowledgement for :meth:`work`."""
        try:
            ack = device_pb2.Ack.FromString(message.payload)
        except DecodeError as error:
            _LOG.warning("acknowledgement of %d bytes: %s", len(message.payload), error)
            return
        self._answers.update((item.id, item) for item in ack.items)

    def work(self) -> float:
        """Take the cloud's answers, announce the device, and send what is due."""
        try:
            if self._answers:
                self._take_answers()
                self._due.set()
            if self._due.is_set() or time.monotonic() >= self._send_at:
                self._due.clear()
                self._send()
        except StorageError as error:
            # The answers are kept, and the items too: nothing is lost by waiting.
            _LOG.error("the outbox cannot be used now: %s", error)
            self._send_at = time.monotonic() + _DISK_RETRY_S
        if self._announce.is_set() or time.monotonic() >= self._birth_at:
            self._announce.clear()
            self._send_birth()
        return max(0.0, min(self._send_at, self._birth_at) - time.monotonic())

    def finished(self) -> bool:
        """Whether the cloud has answered for everything, or takes nothing for now."""
        return self.held is not None or not self._outbox.pending(1)

    def on_goodbye(self) -> Message:
        """Death in good order: the broker drops the will after a clean goodbye."""
        death = device_pb2.Death(channel=self._channel, device=self._device, session=self._session)
        return Message(self._topics["death"], death.SerializeToString())

    def _send_birth(self) -> None:
        service = self._in_service()
        birth = device_pb2.Birth(
            channel=self._channel,
            device=self._device,
            session=self._session,
            student=service.student,
            release=service.release,
            agent_version=self._agent_version,
            created_ms=int(self._clock() * 1000),
        )
        self.publish(Message(self._topics["birth"], birth.SerializeToString()))
        self._birth_at = time.monotonic() + self._random.uniform(0.75, 1.0) * _BIRTH_EVERY_S

    def _take_answers(self) -> None:
        stored: list[str] = []
        for item in self._answers.values():
            if item.status == device_pb2.ACK_STATUS_STORED:
                stored.append(item.id)
            elif item.status == device_pb2.ACK_STATUS_REJECTED:
                if self._outbox.reject(item.id, item.reason):
                    _LOG.error("the cloud rejected %s: %s; set aside", item.id, item.reason)
            elif item.status == device_pb2.ACK_STATUS_LATER:
                self._hold(item)
            else:
                _LOG.warning("unknown answer %d for %s", item.status, item.id)
        removed = self._outbox.stored(stored)
        self._metrics.acknowledged.inc(removed[DEMONSTRATION])
        self._flight = answered(self._flight, self._answers.keys())
        self._answers.clear()

    def _hold(self, item: device_pb2.AckItem) -> None:
        """Send nothing for as long as the cloud says: the outbox keeps all of it."""
        self._metrics.put_off.inc()
        wait = min(max(item.retry_after_ms / 1000, _HOLD_MIN_S), _HOLD_MAX_S)
        until = time.monotonic() + wait * self._random.uniform(1.0, 1.25)
        if self.held is None:
            _LOG.warning("the cloud takes no evidence for %.0f s: %s", wait, item.reason)
        if until > self._held_until:
            self._held_until, self._held_because = until, item.reason

    def _send(self) -> None:
        if self.held is not None:
            self._send_at = self._held_until
            return
        waiting = {i.id: i for i in self._outbox.pending(_LOOKAHEAD * self._policy.window)}
        now = time.monotonic()
        planned = plan(self._policy, self._flight, list(waiting), now=now, random=self._random)
        for item in (waiting[i] for i in planned.send):
            if self.publish(Message(self._topics[item.kind], item.payload)) is None:
                return  # the connection is lost: the next one begins anew
            if item.kind == DEMONSTRATION:
                self._metrics.sent.inc()
        self._flight = planned.flight
        self._demonstrations_in_flight = sum(
            waiting[i].kind == DEMONSTRATION for i in planned.flight.overdue_at
        )
        self._send_at = float("inf") if planned.again_at is None else planned.again_at
