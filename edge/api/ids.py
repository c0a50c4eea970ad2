"""Identifiers made on the device."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

_MS_BITS, _RANDOM_BITS = 48, 74


def uuid7(*, now: float, random: Random) -> str:
    """A UUID of version 7 (RFC 9562): sorts by time.

    Args:
        now: seconds since 1970.
        random: where its 74 random bits come from.

    >>> import random
    >>> one = uuid7(now=1.0, random=random.Random(0)); one[:15], uuid.UUID(one).version
    ('00000000-03e8-7', 7)
    """
    milliseconds = int(now * 1000) & (1 << _MS_BITS) - 1
    bits = random.getrandbits(_RANDOM_BITS)
    high, low = bits >> 62, bits & (1 << 62) - 1
    return str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | high << 64 | 0b10 << 62 | low))
