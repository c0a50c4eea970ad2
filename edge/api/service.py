"""What a device does with a request and with a person's judgement; knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic

from edge.api.answering import answer
from edge.api.fields import RequestError
from edge.api.ids import uuid7
from edge.host import StudentHost, StudentT
from edge.link.outbox import DEMONSTRATION, DRIFT, MAX_PAYLOAD
from edge.memory.store import Demonstration
from edge.student.tokens import surprise
from protos.errors import StorageError
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from edge.api.replies import Completion, Head, Piece
    from edge.api.wire import ChatRequest, Feedback
    from edge.drift.monitor import Alarm, DriftMonitor
    from edge.link.outbox import Outbox
    from edge.memory.store import Memory
    from edge.metrics import DeviceMetrics
    from protos.prompt import Message

_LOG = logging.getLogger(__name__)
REMEMBERED = 1000
"""Completions to which feedback may still come."""


@dataclass(frozen=True)
class Identity:
    """Who the device is."""

    channel: str
    device: str


@dataclass
class _Record:
    """An answer that people may judge. ``demonstrations``: ids by what was said to be right."""

    messages: tuple[Message, ...]
    answer: str
    surprise: float
    schema_broken: bool
    student: str
    monitored: bool
    demonstrations: dict[str, str] = field(default_factory=dict)
    latest: str | None = None
    kept: str | None = None
    judged: bool = False
    corrected: bool = False


class Assistant(Generic[StudentT]):
    """Answers requests and takes corrections. All methods belong to one event loop.

    Args:
        identity: for evidence.
        host: the student in service.
        memory: demonstrations to show.
        drift: watches the answers.
        outbox: takes the evidence.
        wake: called when something new is in the outbox.
        metrics: counts.
        clock: seconds since 1970.
        random: for ids.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        host: StudentHost[StudentT],
        memory: Memory,
        drift: DriftMonitor,
        outbox: Outbox,
        wake: Callable[[], None],
        metrics: DeviceMetrics,
        clock: Callable[[], float],
        random: Random,
    ) -> None:
        self._identity = identity
        self._host = host
        self._memory = memory
        self._drift = drift
        self._outbox = outbox
        self._wake = wake
        self._metrics = metrics
        self._clock = clock
        self._random = random
        self._watched = host.student.digest
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._judging = asyncio.Lock()
        self._unsent: list[device_pb2.DriftReport] = []

    @property
    def student(self) -> str:
        """Digest of the student in service."""
        return self._host.student.digest

    def swapped(self) -> None:
        """Tell that the host may have another student: its drift is watched from the start."""
        self._watch(self._host.student.digest)

    async def complete(
        self, request: ChatRequest, on_piece: Callable[[Head, Piece], None] | None = None
    ) -> Completion:
        """Answer a request.

        Args:
            request: what is asked.
            on_piece: is given each piece of the answer as soon as it is decoded.

        Raises:
            ContextLengthError: the request does not fit, even without demonstrations.
            RequestError: its schemas cannot guide, or it wants more tokens than the context holds.
            BusyError: too many requests wait.
            UnavailableError: the device is stopping.
        """
        if request.monitored:
            await self._report(self._drift.asked())
        loop = asyncio.get_running_loop()

        def tell(head: Head, piece: Piece) -> None:
            if on_piece is not None:
                loop.call_soon_threadsafe(on_piece, head, piece)

        unique = uuid7(now=self._clock(), random=self._random)
        made = await self._host.run(
            partial(
                answer,
                request,
                unique=unique,
                created=int(self._clock()),
                memory=self._memory,
                drifted=self._drift.drifted,
                tell=tell,
            )
        )
        completion = made.completion
        record = _Record(
            messages=made.messages,
            answer=made.text,
            surprise=surprise(made.tokens),
            schema_broken=made.schema_broken,
            student=completion.head.student,
            monitored=request.monitored,
        )
        self._remember(completion.head.id, record)
        if request.monitored:
            self._watch(record.student)
            alarm = self._drift.answered(
                completion.head.id, surprise=record.surprise, schema_broken=record.schema_broken
            )
            await self._report(alarm)
        return completion

    async def judge(self, feedback: Feedback) -> str:
        """Keep a person's judgement as evidence and in working memory; return the evidence's id.

        The same judgement again changes nothing and gives the same id; another one of the same
        answer is new evidence and takes its place in working memory.

        Raises:
            RequestError: the completion is not known, or there is too much text.
            StorageError: the disk is full or failed: nothing was kept.
        """
        async with self._judging:
            record = self._records.get(feedback.completion)
            if record is None:
                msg = (
                    f"completion {feedback.completion!r} is not known: it is not of this device, "
                    f"older than its last start, or older than its latest {REMEMBERED} answers"
                )
                raise RequestError(
                    msg, param="completion_id", code="completion_not_found", status=404
                )
            right = record.answer if feedback.correction is None else feedback.correction
            if not right.strip():
                msg = "the answer was empty: give a correction instead of accepting it"
                raise RequestError(msg, param="accepted")
            if right != record.latest:
                await self._keep(record, right)
            await self._judged(feedback.completion, record)
            return record.demonstrations[right]

    def health(self) -> dict[str, Any]:
        """What is known of student, memory, outbox and drift."""
        try:
            counts = self._outbox.counts()
            outbox: dict[str, Any] = asdict(counts)
            status = "ok"
        except StorageError as error:
            outbox, status = {"error": str(error)}, "degraded"
        return {
            "status": status,
            "channel": self._identity.channel,
            "device": self._identity.device,
            "student": self.student,
            "requests_waiting": self._host.waiting,
            "memory": {"demonstrations": self._memory.size},
            "outbox": outbox,
            "drift": {
                "answered": self._drift.answers,
                "alarms": sum(self._drift.alarms.values()),
                "alarms_by_kind": {k.value: n for k, n in self._drift.alarms.items()},
                "signals": {
                    s.name: {"alarmed": s.alarmed, "baseline": s.baseline, "recent": s.recent}
                    for s in self._drift.states()
                },
            },
        }

    def _remember(self, identity: str, record: _Record) -> None:
        self._records[identity] = record
        while len(self._records) > REMEMBERED:
            self._records.popitem(last=False)

    async def _keep(self, record: _Record, right: str) -> None:
        """Evidence to the outbox first; only what is safe there enters working memory."""
        # What is in the outbox but did not reach memory is not sent twice; a mind that was changed
        # back is new evidence: the cloud takes the newest.
        kept = record.kept == right
        identity = (
            record.demonstrations[right] if kept else uuid7(now=self._clock(), random=self._random)
        )
        if not kept:
            payload = self._evidence(identity, record, right).SerializeToString()
            if len(payload) > MAX_PAYLOAD:
                msg = (
                    f"request, answer and correction take {len(payload)} bytes together; the limit "
                    f"is {MAX_PAYLOAD}: give feedback to a shorter conversation"
                )
                raise RequestError(msg, code="feedback_too_large", status=413)
            await asyncio.to_thread(self._outbox.put, DEMONSTRATION, identity, payload)
            record.demonstrations[right] = identity
            record.kept = right
            source = "confirmation" if right == record.answer else "correction"
            self._metrics.feedback.labels(source).inc()
        left = self._memory.left
        remembered = Demonstration(identity, record.messages, right)
        await asyncio.to_thread(self._memory.add, remembered)
        self._metrics.memory_left.inc(self._memory.left - left)
        record.latest = right

    async def _judged(self, completion: str, record: _Record) -> None:
        """Tell the drift monitor once that an answer was right, and once that it was wrong."""
        corrected = record.latest != record.answer
        news = not record.judged or (corrected and not record.corrected)
        record.judged, record.corrected = True, record.corrected or corrected
        alarm = None
        if news and record.monitored and record.student == self._watched:
            alarm = self._drift.judged(completion, corrected=corrected)
        await self._report(alarm)
        self._wake()

    def _evidence(self, identity: str, record: _Record, right: str) -> device_pb2.Demonstration:
        corrected = right != record.answer
        return device_pb2.Demonstration(
            id=identity,
            channel=self._identity.channel,
            device=self._identity.device,
            student=record.student,
            created_ms=int(self._clock() * 1000),
            messages=[
                device_pb2.ChatMessage(role=m.role, content=m.content) for m in record.messages
            ],
            answer=record.answer,
            correction=right,
            source=(device_pb2.SOURCE_CORRECTION if corrected else device_pb2.SOURCE_CONFIRMATION),
            signals=device_pb2.Signals(
                surprise=record.surprise,
                schema_broken=record.schema_broken,
                corrected=corrected,
            ),
        )

    def _watch(self, student: str) -> None:
        if student != self._watched:
            self._watched = student
            self._drift.swapped()

    async def _report(self, alarm: Alarm | None) -> None:
        """Send an alarm, and those before it that found the disk full."""
        self._metrics.signals(self._drift.states())
        if alarm is not None:
            self._metrics.alarms.labels(alarm.kind.value).inc()
            _LOG.warning("drift (%s) after %d answers", alarm.kind.value, alarm.answered)
            self._unsent.append(self._drift_report(alarm))
        while self._unsent:
            report = self._unsent[0]
            try:
                await asyncio.to_thread(
                    self._outbox.put, DRIFT, report.id, report.SerializeToString()
                )
            except StorageError as error:
                _LOG.error("the drift report waits in RAM: %s", error)
                return
            if self._unsent and self._unsent[0] is report:
                del self._unsent[0]
            self._wake()

    def _drift_report(self, alarm: Alarm) -> device_pb2.DriftReport:
        now = self._clock()
        return device_pb2.DriftReport(
            id=uuid7(now=now, random=self._random),
            channel=self._identity.channel,
            device=self._identity.device,
            student=self._watched,
            created_ms=int(now * 1000),
            kind=device_pb2.DriftKind.Value(f"DRIFT_KIND_{alarm.kind.name}"),
            signals=[
                device_pb2.SignalState(
                    name=s.name,
                    alarmed=s.alarmed,
                    baseline=s.baseline or 0.0,
                    recent=s.recent or 0.0,
                )
                for s in alarm.signals
            ],
            answered=alarm.answered,
        )
