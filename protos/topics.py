"""MQTT topics: ``anabranch/v1/<channel>/<device>/<kind>``."""

from __future__ import annotations

import re
from typing import NamedTuple

from protos.errors import InvalidInputError

ROOT = "anabranch/v1"
UP = ("birth", "death", "demonstration", "drift")
DOWN = ("ack",)
_PARTS = 5
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Topic(NamedTuple):
    """A parsed topic."""

    channel: str
    device: str
    kind: str


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can stand in a topic, a path and a label; raise otherwise.

    >>> check_name("kitchen-1", "device")
    'kitchen-1'
    """
    if not _NAME.fullmatch(name):
        msg = (
            f"{what} {name!r} is not a name: use 1 to 64 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
        raise InvalidInputError(msg)
    return name


def topic(channel: str, device: str, kind: str) -> str:
    """Build a topic.

    >>> topic("home", "kitchen-1", "drift")
    'anabranch/v1/home/kitchen-1/drift'
    """
    if kind not in UP + DOWN:
        msg = f"topic kind {kind!r} is not one of {', '.join(UP + DOWN)}"
        raise InvalidInputError(msg)
    return f"{ROOT}/{check_name(channel, 'channel')}/{check_name(device, 'device')}/{kind}"


def parse(text: str) -> Topic:
    """Parse a topic; raise :class:`InvalidInputError` for any other.

    >>> parse("anabranch/v1/home/kitchen-1/drift")
    Topic(channel='home', device='kitchen-1', kind='drift')
    """
    parts = text.split("/")
    if len(parts) != _PARTS or "/".join(parts[:2]) != ROOT or parts[4] not in UP + DOWN:
        msg = f"{text!r} is not a topic of the form {ROOT}/<channel>/<device>/<kind>"
        raise InvalidInputError(msg)
    return Topic(check_name(parts[2], "channel"), check_name(parts[3], "device"), parts[4])
