"""Reads what devices publish: pure checks, no I/O.

A message is either understood or refused with one of a few reasons. Where the id of refused
evidence can be read, the device is told, so that it sets the item aside instead of sending it
again for ever.
"""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from edge.link.outbox import MAX_PAYLOAD
from protos import topics
from protos.errors import InvalidInputError
from protos.prompt import ROLES
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

DeviceMessage = (
    device_pb2.Birth | device_pb2.Death | device_pb2.Demonstration | device_pb2.DriftReport
)
_TYPES: dict[str, Callable[[], DeviceMessage]] = {
    "birth": device_pb2.Birth,
    "death": device_pb2.Death,
    "demonstration": device_pb2.Demonstration,
    "drift": device_pb2.DriftReport,
}
_MAX_INTEGER = 2**63 - 1  # SQLite's
_UUID_LENGTH = 36
_UUID_VERSION = 7
_ID_FIELD = bytes([1 << 3 | 2, _UUID_LENGTH])  # field 1, length-delimited, 36 bytes


class Reason(StrEnum):
    """Why a message was not stored; the values of a metric's label."""

    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    WRONG_TOPIC = "wrong_topic"
    IMPOSTOR = "impostor"
    INVALID = "invalid"
    OVERLOADED = "overloaded"  # not rejected for good: the device sends it again
    STORAGE = "storage"  # likewise
    QUOTA = "quota"  # likewise, and the device is told when
    IDENTITY = "identity"  # likewise: the device has no certificate in force, or another channel


@dataclass(frozen=True)
class Refused:
    """A message that is not taken.

    Attributes:
        reason: for the metric.
        detail: for the log and the device.
        id: of the evidence, where it can be read.
        retry_after_s: when it may be taken all the same; 0: never.
    """

    reason: Reason
    detail: str
    id: str | None = None
    retry_after_s: float = 0.0


def read(topic: topics.Topic, payload: bytes) -> DeviceMessage | Refused:
    """Understand a message, or say why not. Whether evidence is of use the store checks."""
    if topic.kind not in topics.UP:
        return Refused(Reason.WRONG_TOPIC, f"devices publish no {topic.kind}")
    evidence = topic.kind in ("demonstration", "drift")
    early_id = peek_id(payload) if evidence else None
    if len(payload) > MAX_PAYLOAD:
        detail = f"{len(payload)} bytes; the limit is {MAX_PAYLOAD}"
        return Refused(Reason.TOO_LARGE, detail, early_id)
    message: DeviceMessage = _TYPES[topic.kind]()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        return Refused(Reason.MALFORMED, f"not a {topic.kind}: {error}", early_id)
    if (message.channel, message.device) != (topic.channel, topic.device):
        # A message that claims nothing is no message of ours: most often it is empty.
        reason = Reason.IMPOSTOR if message.channel or message.device else Reason.MALFORMED
        detail = f"comes from {message.channel[:64]!r}/{message.device[:64]!r} by its content"
        return Refused(reason, detail, early_id)
    numbers = (getattr(message, "session", 0), getattr(message, "release", 0))
    if max(numbers) > _MAX_INTEGER:
        return Refused(Reason.MALFORMED, f"session or release is beyond {_MAX_INTEGER}")
    return message


def peek_id(payload: bytes) -> str | None:
    r"""The UUID at the front of a message that may be malformed or far too large.

    >>> peek_id(b"\n\x24" + b"01900000-0000-7000-8000-000000000000" + b"\xff...")
    '01900000-0000-7000-8000-000000000000'
    >>> peek_id(b"garbage") is None
    True
    """
    if not payload.startswith(_ID_FIELD):
        return None
    text = payload[len(_ID_FIELD) : len(_ID_FIELD) + _UUID_LENGTH]
    try:
        check_id(text.decode("ascii"))
    except (UnicodeDecodeError, InvalidInputError):
        return None
    return text.decode("ascii")


def check_id(text: str) -> None:
    """Raise :class:`InvalidInputError` unless ``text`` is a UUIDv7 in its canonical form."""
    try:
        parsed = uuid.UUID(text)
    except ValueError:
        parsed = None
    if parsed is None or str(parsed) != text or parsed.version != _UUID_VERSION:
        msg = f"id {text[:64]!r} is not a UUIDv7 in lower case with hyphens"
        raise InvalidInputError(msg)


def check_demonstration(message: device_pb2.Demonstration) -> None:
    """Raise :class:`InvalidInputError` unless something can be learned from ``message``."""
    check_id(message.id)
    _check_origin(message)
    if not message.messages or message.messages[-1].role != "user":
        msg = f"demonstration {message.id}: the last of its messages must be the user's"
        raise InvalidInputError(msg)
    roles = {m.role for m in message.messages} - set(ROLES)
    if roles:
        msg = f"demonstration {message.id}: roles are {', '.join(ROLES)}, not {sorted(roles)}"
        raise InvalidInputError(msg)
    if not message.correction:
        msg = f"demonstration {message.id} does not say what the answer should have been"
        raise InvalidInputError(msg)
    if message.source not in (device_pb2.SOURCE_CORRECTION, device_pb2.SOURCE_CONFIRMATION):
        msg = f"demonstration {message.id} does not say what it rests on (source {message.source})"
        raise InvalidInputError(msg)
    if not math.isfinite(message.signals.surprise):
        msg = f"demonstration {message.id}: surprise is {message.signals.surprise}"
        raise InvalidInputError(msg)


def check_drift(message: device_pb2.DriftReport) -> None:
    """Raise :class:`InvalidInputError` unless ``message`` says which kind of drift it saw."""
    check_id(message.id)
    _check_origin(message)
    kinds = (
        device_pb2.DRIFT_KIND_INPUT,
        device_pb2.DRIFT_KIND_CONCEPT,
        device_pb2.DRIFT_KIND_BOTH,
    )
    if message.kind not in kinds:
        msg = f"drift report {message.id} is of no known kind ({message.kind})"
        raise InvalidInputError(msg)
    if not all(math.isfinite(s.baseline) and math.isfinite(s.recent) for s in message.signals):
        msg = f"drift report {message.id} holds a signal that is not a finite number"
        raise InvalidInputError(msg)


def _check_origin(message: device_pb2.Demonstration | device_pb2.DriftReport) -> None:
    topics.check_name(message.channel, "channel")
    topics.check_name(message.device, "device")
    if message.created_ms <= 0:
        msg = f"{message.id} has no time (created_ms {message.created_ms})"
        raise InvalidInputError(msg)
