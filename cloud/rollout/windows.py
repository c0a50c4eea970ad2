"""Maintenance windows: local hours in which a device may begin to update. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


def is_open(windows: Iterable[str], time_zone: str, now: float) -> bool:
    """Whether one of the windows is open; without windows it always is.

    A window ends on the next day when its end is not after its beginning. Where clocks are set
    forward, what lies in the hour that is left out does not open that day.

    Args:
        windows: such as ``02:00-05:00``, begin included, end not.
        time_zone: by its IANA name, such as ``Europe/Berlin``.
        now: seconds since the epoch.

    Raises:
        InvalidInputError: a window or the time zone is none.

    >>> is_open(["22:00-05:00"], "Europe/Berlin", 1_800_000_000)  # 9:00 there
    False
    >>> is_open(["22:00-05:00"], "Asia/Tokyo", 1_800_000_000 + 6 * 3600)  # 23:00 there
    True
    """
    spans = [parse(window) for window in windows]
    if not spans:
        return True
    local = datetime.fromtimestamp(now, UTC).astimezone(zone(time_zone))
    minute = local.hour * 60 + local.minute
    return any(
        begin <= minute < end if begin < end else minute >= begin or minute < end
        for begin, end in spans
    )


@lru_cache
def parse(window: str) -> tuple[int, int]:
    """Begin and end of a window, in minutes of the day.

    Raises:
        InvalidInputError: it is no window.

    >>> parse("02:00-05:30")
    (120, 330)
    """
    found = _WINDOW.fullmatch(window)
    if found is None:
        msg = f"maintenance window {window!r} is not of the form 02:00-05:00"
        raise InvalidInputError(msg)
    begin_hour, begin_minute, end_hour, end_minute = map(int, found.groups())
    return begin_hour * 60 + begin_minute, end_hour * 60 + end_minute


@lru_cache
def zone(name: str) -> ZoneInfo:
    """A time zone.

    Raises:
        InvalidInputError: there is none of this name.
    """
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError) as error:
        msg = f"time zone {name!r} is not known: write an IANA name such as Europe/Berlin or UTC"
        raise InvalidInputError(msg) from error
