"""What can happen to a rollout, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloud.rollout.state import Content, Plan


@dataclass(frozen=True)
class Begin:
    """A new release supersedes what was there. ``devices`` are known from elsewhere (evidence)."""

    release: Content
    plan: Plan
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Seen:
    """A device opened its first watch stream and says what it runs."""

    device: str
    student: str
    release: int


@dataclass(frozen=True)
class Gone:
    """A device's last watch stream ended."""

    device: str


class Outcome(StrEnum):
    """What a report says of the update."""

    PROGRESS = "progress"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass(frozen=True)
class Report:
    """A device tells how its update to ``release`` goes; ``student`` is in service now."""

    device: str
    release: int
    outcome: Outcome
    student: str
    sequence: int
    detail: str = ""


@dataclass(frozen=True)
class Alarm:
    """A device's drift vote raised an alarm while it ran ``student``."""

    device: str
    student: str


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Restarted:
    """The cloud was away: no stream is left, and what was not heard was not silence."""


@dataclass(frozen=True)
class Pause:
    """A person holds the rollout."""


@dataclass(frozen=True)
class Resume:
    """A person lets the rollout go on; devices that failed until now count no more."""


@dataclass(frozen=True)
class Abort:
    """A person or the policy gives the release up."""

    reason: str


Event = Begin | Seen | Gone | Report | Alarm | Tick | Restarted | Pause | Resume | Abort


@dataclass(frozen=True)
class SetTarget:
    """Tell a device which version it should run; 0: nothing to do."""

    device: str
    release: int


@dataclass(frozen=True)
class RollBack:
    """Publish a newer release with this content, and begin its rollout."""

    channel: str
    content: Content


Command = SetTarget | RollBack
