"""Prove a new student beside the running one, before it serves anybody."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edge.student.runtime import Decoding, greedy
from protos.errors import ProbeError
from protos.prompt import Message, chat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from protos.harness import Harness
    from protos.v1 import release_pb2


class Answered(Protocol):
    """What a probe reads of an answer."""

    @property
    def text(self) -> str:
        """The whole answer."""
        ...


class Student(Protocol):
    """What an update needs of a student (``edge/student/runtime.py``)."""

    @property
    def harness(self) -> Harness:
        """Its harness, which says how long an answer may be."""
        ...

    def answer(self, messages: Sequence[Message], decoding: Decoding) -> Answered:
        """Decode a whole answer."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


@dataclass(frozen=True)
class Probed:
    """What a probe saw: share of canaries answered alike, slowest seconds, resident bytes."""

    equal_share: float
    seconds: float
    rss_bytes: int


def probe(
    student: Student,
    canaries: Sequence[release_pb2.Canary],
    *,
    monotonic: Callable[[], float],
    rss_bytes: Callable[[], int],
) -> Probed:
    """Answer every canary greedily as a request would be, and as the gate did on the same file.

    Without demonstrations: working memory differs from device to device.
    """
    decoding = greedy(student.harness)
    equal, slowest = 0, 0.0
    for canary in canaries:
        messages = [Message(m.role, m.content) for m in canary.messages]
        start = monotonic()
        prompt = chat(student.harness.system, messages)
        equal += student.answer(prompt, decoding).text == canary.answer
        slowest = max(slowest, monotonic() - start)
    share = equal / len(canaries) if canaries else 1.0
    return Probed(share, slowest, rss_bytes())


def judge(probed: Probed, bounds: release_pb2.ProbeBounds) -> None:
    """Compare with the release's bounds; a bound of zero is none.

    Raises:
        ProbeError: the student must not serve; the message names each bound that it broke.
    """
    broken = []
    if probed.equal_share < bounds.min_equal_share:
        broken.append(
            f"{probed.equal_share:.0%} of canaries were answered as in the cloud, "
            f"{bounds.min_equal_share:.0%} are needed"
        )
    if 0 < bounds.max_seconds < probed.seconds:
        broken.append(
            f"a canary took {probed.seconds:.2f} s, {bounds.max_seconds:.2f} s are allowed"
        )
    if 0 < bounds.max_rss_bytes < probed.rss_bytes:
        broken.append(
            f"the process took {probed.rss_bytes} bytes, {bounds.max_rss_bytes} are allowed"
        )
    if broken:
        msg = f"the new student failed its probe: {'; '.join(broken)}"
        raise ProbeError(msg)


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say (no ``/proc``).

    >>> resident_bytes() >= 0
    True
    """
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
