"""What can happen to a rollout, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloud.rollout.plan import Plan
    from cloud.rollout.state import Content


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


@dataclass(frozen=True)
class Bring:
    """A person wants an earlier release's content in a newer release: ``plan`` None: as usual.

    ``gives_up``: the present release is aborted (a rollback).
    """

    content: Content
    gives_up: bool
    reason: str
    plan: Plan | None = None


@dataclass(frozen=True)
class Pin:
    """A person holds a device at a release, or takes it there."""

    device: str
    release: int


@dataclass(frozen=True)
class Unpin:
    """A person lets a device follow the rollouts again."""

    device: str


@dataclass(frozen=True)
class Unbox:
    """A person takes a device out of the penalty box, and forgets its failures."""

    device: str


@dataclass(frozen=True)
class Worse:
    """The guard found that a release serves people worse than what they had before."""

    release: int
    reason: str


Order = Pause | Resume | Abort | Bring | Pin | Unpin | Unbox
Event = Begin | Seen | Gone | Report | Tick | Restarted | Worse | Order


@dataclass(frozen=True)
class SetTarget:
    """Tell a device which version it should run; 0: nothing to do."""

    device: str
    release: int


@dataclass(frozen=True)
class Publish:
    """Publish a newer release with this content, and begin its rollout."""

    channel: str
    content: Content


Command = SetTarget | Publish
