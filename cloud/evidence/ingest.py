"""Takes in what devices publish: MQTT in, SQLite, and only then an acknowledgement.

The MQTT thread puts messages into a bounded queue; one writer thread stores them in batches, and
after the commit hands the acknowledgements back. What is not stored (full queue, failed disk) is
not acknowledged, so the device keeps it and sends it again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING, TypeVar

from cloud.evidence.messages import DeviceMessage, Reason, Refused, peek_id, read
from cloud.evidence.quota import EvidenceLimits, EvidenceQuota, Sender
from cloud.evidence.store import EvidenceStore, Outcome, Receipt
from edge.link.mqtt import Message, MqttLink
from protos import topics
from protos.errors import InvalidInputError, RefusedError, StorageError
from protos.topics import Topic
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random
    from ssl import SSLContext

    from cloud.evidence.metrics import IngestMetrics
    from edge.link.address import Address

_LOG = logging.getLogger(__name__)
_QUEUE = 1024  # messages of at most 64 KiB: larger ones are refused before
_BATCH = 256
_STOP_POLL_S = 0.2
_DISK_PAUSE_S = 1.0
_IDENTITY_RETRY_S = 600.0  # somebody must enrol the device first
_DRIFT_KINDS = {
    device_pb2.DRIFT_KIND_INPUT: "input",
    device_pb2.DRIFT_KIND_CONCEPT: "concept",
    device_pb2.DRIFT_KIND_BOTH: "both",
}
_Arrival = tuple[Topic, DeviceMessage | Refused]
Evidence = TypeVar("Evidence", device_pb2.Demonstration, device_pb2.DriftReport)


class Ingest:
    """The evidence ingest of one cloud process.

    Args:
        address: the broker's MQTT 5 listener.
        store: where evidence goes.
        metrics: counts what comes in.
        random: for the client's name and the jitter of retries.
        channel: whose evidence is taken; another cloud on the same broker takes another's, and
            what nobody stores must not be acknowledged. "+" takes every channel's.
        check_sender: raises RefusedError for a channel and device whose messages are not taken. The
            broker's access list makes sure that the topic says who sent a message.
        limits: what one device may give.
        tls: see :class:`~edge.link.mqtt.MqttLink`.
        monotonic: seconds of a clock that only goes on.
    """

    def __init__(
        self,
        *,
        address: Address,
        store: EvidenceStore,
        metrics: IngestMetrics,
        random: Random,
        channel: str = "+",
        check_sender: Callable[[str, str], None] | None = None,
        limits: EvidenceLimits | None = None,
        tls: Callable[[], SSLContext] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._check_sender = check_sender
        self._quota = EvidenceQuota(limits or EvidenceLimits())
        self._monotonic = monotonic
        self._metrics = metrics
        self._queue: queue.Queue[_Arrival] = queue.Queue(_QUEUE)
        self._stop = threading.Event()
        self._link = _Receiver(
            address=address, channel=channel, receive=self._receive, random=random, tls=tls
        )
        self._writer = threading.Thread(target=self._write, name="evidence-writer", daemon=True)
        metrics.watch_devices(lambda channel: sum(d.online for d in store.devices(channel)))

    @property
    def connected(self) -> bool:
        """Whether the broker delivers to us now."""
        return self._link.connected

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the broker delivers; False if it does not after ``timeout_s`` seconds."""
        return self._link.wait_connected(timeout_s)

    def start(self) -> None:
        """Connect and take in, in the background."""
        self._writer.start()
        self._link.start()

    def stop(self) -> None:
        """Store and acknowledge what has arrived, then disconnect."""
        self._stop.set()
        if self._writer.is_alive():
            self._writer.join()
        self._link.stop()

    def _receive(self, message: Message) -> None:
        """In the MQTT thread: understand a message and queue it for the writer."""
        size = len(message.payload)
        try:
            topic = topics.parse(message.topic)
        except InvalidInputError as error:
            self._metrics.refused(None, Reason.WRONG_TOPIC)
            _LOG.warning("refused %d bytes: %.200s", size, error)
            return
        what = self._stranger(topic, message.payload) or read(topic, message.payload)
        if isinstance(what, Refused):
            self._refuse(topic, what.reason, size, what.detail)
            if what.id is None:
                return
        try:
            self._queue.put_nowait((topic, what))
        except queue.Full:
            self._metrics.refused(topic.channel, Reason.OVERLOADED)

    def _stranger(self, topic: Topic, payload: bytes) -> Refused | None:
        """Why nothing is taken from this device, if so; it keeps what it has."""
        if self._check_sender is None:
            return None
        try:
            self._check_sender(topic.channel, topic.device)
        except RefusedError as error:
            told = peek_id(payload)
            return Refused(Reason.IDENTITY, str(error), told, _IDENTITY_RETRY_S)
        return None

    def _refuse(self, topic: Topic, reason: Reason, size: int, detail: str) -> None:
        self._metrics.refused(topic.channel, reason)
        _LOG.warning("refused %d bytes on %s (%s): %s", size, topics.topic(*topic), reason, detail)

    def _write(self) -> None:
        while True:
            batch = self._take()
            if not batch:
                if self._stop.is_set():
                    return
                continue
            try:
                self._store_batch(batch)
            except StorageError as error:
                _LOG.error("%d messages wait on their devices: %s", len(batch), error)
                self._put_off(batch)
            except Exception:  # noqa: BLE001 - a writer that ended here would lose all evidence
                _LOG.exception(
                    "%d messages cannot be stored: they wait on their devices", len(batch)
                )
                self._put_off(batch)

    def _take(self) -> list[_Arrival]:
        """What has arrived, at most a batch; empty if nothing came for a moment."""
        batch: list[_Arrival] = []
        try:
            batch.append(self._queue.get(timeout=_STOP_POLL_S))
            while len(batch) < _BATCH:
                batch.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return batch

    def _put_off(self, batch: Sequence[_Arrival]) -> None:
        for topic, _ in batch:
            self._metrics.refused(topic.channel, Reason.STORAGE)
        self._stop.wait(_DISK_PAUSE_S)

    def _store_batch(self, batch: Sequence[_Arrival]) -> None:
        answers: dict[Topic, list[Receipt]] = defaultdict(list)
        demonstrations: list[tuple[Topic, device_pb2.Demonstration]] = []
        reports: list[tuple[Topic, device_pb2.DriftReport]] = []
        for topic, what in batch:
            match what:
                case Refused():
                    answers[topic].append(_receipt(what))
                case device_pb2.Birth():
                    self._store.birth(what)
                case device_pb2.Death():
                    self._store.death(what)
                case device_pb2.Demonstration():
                    demonstrations.append((topic, what))
                case device_pb2.DriftReport():
                    reports.append((topic, what))
        self._store_demonstrations(self._within_quota(demonstrations, answers), answers)
        self._store_reports(self._within_quota(reports, answers), answers)
        if answers:
            self._link.acknowledge([_ack(topic, r) for topic, r in answers.items()])

    def _within_quota(
        self, arrived: Sequence[tuple[Topic, Evidence]], answers: dict[Topic, list[Receipt]]
    ) -> list[tuple[Topic, Evidence]]:
        """What is in the quota of its device; the others are answered."""
        taken = []
        for topic, message in arrived:
            size, now = message.ByteSize(), self._monotonic()
            refused = self._quota.take(_sender(topic), message.id, size, now=now)
            if refused is None:
                taken.append((topic, message))
            else:
                self._metrics.refused(topic.channel, refused.reason)
                answers[topic].append(_receipt(refused))
        return taken

    def _add(
        self,
        arrived: Sequence[tuple[Topic, Evidence]],
        add: Callable[[Sequence[Evidence]], list[Receipt]],
    ) -> list[Receipt]:
        """Store messages; what did not become new evidence costs no quota."""
        receipts: list[Receipt] = []
        try:
            receipts = add([message for _, message in arrived])
        finally:
            now = self._monotonic()
            for number, (topic, message) in enumerate(arrived):
                if not receipts or receipts[number].outcome is not Outcome.NEW:
                    self._quota.give_back(_sender(topic), message.ByteSize(), now=now)
        return receipts

    def _store_demonstrations(
        self,
        arrived: Sequence[tuple[Topic, device_pb2.Demonstration]],
        answers: dict[Topic, list[Receipt]],
    ) -> None:
        receipts = self._add(arrived, self._store.add)
        for (topic, _), receipt in zip(arrived, receipts, strict=True):
            answers[topic].append(receipt)
            label = self._metrics.label(topic.channel)
            if receipt.outcome is Outcome.NEW:
                self._metrics.stored.labels(label).inc()
            elif receipt.outcome is Outcome.DUPLICATE:
                self._metrics.duplicate.labels(label).inc()
            else:
                self._reject(topic, receipt)

    def _store_reports(
        self,
        arrived: Sequence[tuple[Topic, device_pb2.DriftReport]],
        answers: dict[Topic, list[Receipt]],
    ) -> None:
        receipts = self._add(arrived, self._store.add_drift)
        for (topic, report), receipt in zip(arrived, receipts, strict=True):
            answers[topic].append(receipt)
            if receipt.outcome is Outcome.NEW:
                label = self._metrics.label(topic.channel)
                self._metrics.drift.labels(label, _DRIFT_KINDS[report.kind]).inc()
            elif receipt.outcome is Outcome.REJECTED:
                self._reject(topic, receipt)

    def _reject(self, topic: Topic, receipt: Receipt) -> None:
        self._metrics.refused(topic.channel, Reason.INVALID)
        _LOG.warning("rejected a message on %s: %s", topics.topic(*topic), receipt.reason)


def _sender(topic: Topic) -> Sender:
    return Sender(topic.channel, topic.device)


def _receipt(refused: Refused) -> Receipt:
    """As the device is told that a message was not taken."""
    outcome = Outcome.LATER if refused.retry_after_s else Outcome.REJECTED
    return Receipt(refused.id or "", outcome, refused.detail, refused.retry_after_s)


def _ack(topic: Topic, receipts: Sequence[Receipt]) -> Message:
    """The answer to the device that published on ``topic``."""
    ack = device_pb2.Ack(items=[receipt.ack() for receipt in receipts])
    return Message(topics.topic(topic.channel, topic.device, "ack"), ack.SerializeToString())


class _Receiver(MqttLink):
    """The cloud's end of the link: hands on what arrives, and publishes acknowledgements."""

    def __init__(
        self,
        *,
        address: Address,
        channel: str,
        receive: Callable[[Message], None],
        random: Random,
        tls: Callable[[], SSLContext] | None,
    ) -> None:
        self._receive = receive
        self._acks: deque[Message] = deque()
        super().__init__(
            address=address,
            # Two clouds on one broker must not take over each other's connection.
            client_id=f"anabranch-cloud-{random.getrandbits(64):016x}",
            subscriptions=[f"{topics.ROOT}/{channel}/+/{kind}" for kind in topics.UP],
            random=random,
            tls=tls,
        )

    def acknowledge(self, acks: Sequence[Message]) -> None:
        """Publish soon, in the link's thread."""
        self._acks.extend(acks)
        self.wake()

    def on_will(self) -> None:
        """The cloud leaves no will."""

    def on_up(self) -> None:
        """Nothing to say."""

    def on_message(self, message: Message) -> None:
        """Hand on."""
        self._receive(message)

    def work(self) -> None:
        """Publish what was acknowledged; what is lost here the devices ask for again."""
        while self._acks:
            self.publish(self._acks.popleft())

    def finished(self) -> bool:
        """Whether every acknowledgement is on its way."""
        return not self._acks

    def on_goodbye(self) -> None:
        """Nothing to say."""
