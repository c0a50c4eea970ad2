"""Which demonstrations a job gets: to learn, to hold out, to replay, to ask again.

Pure rules: what of a fleet's evidence is worth learning (:mod:`cloud.curator` asks), and how
demonstrations, a fleet's or a file's (:mod:`cloud.teaching`), are divided.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from protos.prompt import Message, Shown
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence


class HasId(Protocol):
    """What has a name of its own, such as a demonstration."""

    @property
    def id(self) -> str:
        """The name."""


Named = TypeVar("Named", bound=HasId)

HELD_OUT_SHARE = 0.15
_HELD_OUT = (8, 40)
REPLAY = 300
"""At most, half of what a job of the default length draws: facts not replayed are lost."""
CONFIRMED = 32
"""At most so many answers that people confirmed are replayed."""
EARLIER = 40
"""At most so many of those held out before are asked again."""
_NEVER_MS = 1 << 62


@dataclass(frozen=True)
class Evidence:
    """Ids of demonstrations: what a job learns, what it holds out, what waits for another job."""

    learn: tuple[str, ...]
    held_out: tuple[str, ...]
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lessons(Generic[Named]):
    """What a job gets: ``replay`` is held to what was said of it, ``earlier`` is asked again."""

    learn: list[Named]
    held_out: list[Named]
    waiting: list[Named]
    replay: list[Named]
    earlier: list[Named]

    @property
    def evidence(self) -> Evidence:
        """What is written down beside the job."""
        parts = (self.learn, self.held_out, self.waiting)
        return Evidence(*(tuple(d.id for d in part) for part in parts))


def _shuffled(demonstrations: Iterable[Named]) -> list[Named]:
    """In an order that neither time nor device decides, always the same."""
    return sorted(demonstrations, key=lambda d: hashlib.sha256(d.id.encode()).digest())


def shown(demonstration: device_pb2.Demonstration) -> Shown:
    """A demonstration as prompts show it."""
    messages = tuple(Message(m.role, m.content) for m in demonstration.messages)
    return Shown(messages, demonstration.correction)


def newest_each(
    demonstrations: Sequence[device_pb2.Demonstration], taken: Collection[str] = ()
) -> list[device_pb2.Demonstration]:
    """One demonstration for each request, the newest: people may change their minds.

    What is older than one of the ids ``taken`` (learnt or held out) is settled with it. Who
    confirms what a correction said before says nothing new: the correction stays.

    Args:
        demonstrations: the oldest first.
        taken: ids that are not given again.
    """
    latest: dict[tuple[Message, ...], device_pb2.Demonstration] = {}
    for d in demonstrations:
        request = shown(d).messages
        before = latest.get(request)
        if d.id in taken:
            latest.pop(request, None)
        elif (
            before is None
            or d.source == device_pb2.SOURCE_CORRECTION
            or d.correction != before.correction
        ):
            latest[request] = d
    return list(latest.values())


def alarms(reports: Sequence[device_pb2.DriftReport]) -> dict[tuple[str, str], int]:
    """When each device first raised an alarm on each student: milliseconds by the device's clock.

    Keys are (device, student's digest).
    """
    first: dict[tuple[str, str], int] = {}
    for report in reports:
        key = (report.device, report.student)
        first[key] = min(report.created_ms, first.get(key, report.created_ms))
    return first


def worth_learning(
    demonstrations: Sequence[device_pb2.Demonstration], since: Mapping[tuple[str, str], int]
) -> list[device_pb2.Demonstration]:
    """What is worth learning: corrections, and what was confirmed after an alarm (``since``).

    After an alarm an answer is right thanks to working memory, which the weights do not have yet.
    Of those at most as many as there are corrections: most confirmations say what is known.
    """
    corrected = [d for d in demonstrations if d.source == device_pb2.SOURCE_CORRECTION]
    confirmed = [
        d
        for d in demonstrations
        if d.source == device_pb2.SOURCE_CONFIRMATION
        and d.created_ms >= since.get((d.device, d.student), _NEVER_MS)
    ]
    return corrected + _shuffled(confirmed)[: len(corrected)]


def divide(
    new: Sequence[Named],
    settled: Sequence[tuple[Named, bool]],
    said: Callable[[Named], Shown],
    most: int,
    confirmed: Iterable[Named] = (),
) -> Lessons[Named]:
    """Divide new demonstrations into what is learnt, ``most`` at once, and held out for the gate.

    What was trained on before is not held out: it would test nothing. What is in neither waits for
    the next job. Of what was settled before, what was learnt is replayed, as it was said last, and
    what was held out is asked again; nothing of it that was said anew. All of it by what was asked
    and not by id: nothing that is tested may be trained on, and what people have changed their
    minds about is neither tested nor held on to in its old form.

    Args:
        new: one of each request.
        settled: the oldest first, each with whether it was held out.
        said: a demonstration's request and answer.
        most: as many as the job's steps can learn.
        confirmed: answers of the student in service, to be replayed too.
    """
    requests = {said(d).messages for d in new}
    last = {said(d).messages: (d, tested) for d, tested in settled}
    kept = [pair for asked, pair in last.items() if asked not in requests]
    earlier = [d for d, tested in kept if tested]
    never_replayed = requests | {said(d).messages for d in earlier}
    trained = {said(d) for d, tested in settled if not tested}

    ordered = _shuffled(new)
    least, largest = _HELD_OUT
    number = min(largest, max(least, round(len(ordered) * HELD_OUT_SHARE)))
    held = [d for d in ordered if said(d) not in trained][:number]
    tested_now = {d.id for d in held}
    others = [d for d in ordered if d.id not in tested_now]
    return Lessons(
        learn=others[:most],
        held_out=held,
        waiting=others[most:],
        replay=[
            *_shuffled(d for d, tested in kept if not tested)[:REPLAY],
            *(
                d
                for d in _shuffled(confirmed)[:CONFIRMED]
                if said(d).messages not in never_replayed
            ),
        ],
        earlier=_shuffled(earlier)[:EARLIER],
    )
