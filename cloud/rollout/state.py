"""What is known about the rollout of a channel's newest release: plain data, and its JSON.

The rules that change it are in :mod:`cloud.rollout.machine`.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from cloud.rollout.census import Census, recount, take
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SCHEMA: Final = 1
_NOT_IN_HEADER: Final = ("devices", "census", "moved")
REST: Final = "rest"


class Phase(StrEnum):
    """Where a channel's rollout is."""

    IDLE = "idle"  # no release yet
    RUNNING = "running"
    PAUSED = "paused"  # a person's hold: devices that were told go on, no more are told
    HALTED = "halted"  # the rules' hold: too many failed; a person or a newer release goes on
    DONE = "done"  # every wave is through; a device that appears now is told at once
    ABORTED = "aborted"  # given up; a newer release brings back what was before


class Health(StrEnum):
    """How a device does with the release that is being rolled out."""

    WAITING = "waiting"  # not told yet
    UPDATING = "updating"
    COMMITTED = "committed"
    FAILED = "failed"
    SILENT = "silent"  # told, and then nothing until the deadline; counts as failed


@dataclass(frozen=True)
class Plan:
    """How careful a rollout is.

    A wave's size is a count, a share of the known devices (a float between 0 and 1), or "rest",
    which is always and only the last one. Times are in seconds.
    """

    waves: tuple[int | float | str, ...] = (1, REST)
    min_committed: int = 1
    """A wave is through when at least so many of its devices committed (all, if it has fewer)..."""
    min_healthy_share: float = 0.9
    """...and at least this share of its devices."""
    halt_failures: int = 3
    """The rollout halts when at least so many devices failed..."""
    halt_share: float = 0.2
    """...and at least this share of those that committed or failed."""
    silence_s: float = 600.0
    """A device that was told and says nothing for this long counts as failed..."""
    total_s: float = 3600.0
    """...and so does one that is not done after this long, whatever it says."""
    soak_s: float = 0.0
    """A commit counts towards the next wave only when it has held this long."""
    max_flaps: int = 3
    """A device that falls back after a commit this often counts as failed."""

    def __post_init__(self) -> None:
        if not self.waves or self.waves[-1] != REST or REST in self.waves[:-1]:
            msg = f'rollout waves {self.waves} must end in "{REST}", and only end in it'
            raise InvalidInputError(msg)
        for size in self.waves[:-1]:
            count = isinstance(size, int) and not isinstance(size, bool) and size >= 1
            if not (count or (isinstance(size, float) and 0.0 < size < 1.0)):
                msg = (
                    f"wave size {size!r} is neither a count of at least 1 nor a share between 0 "
                    "and 1"
                )
                raise InvalidInputError(msg)
        shares = (self.min_healthy_share, self.halt_share)
        if min(self.min_committed, self.halt_failures, self.max_flaps) < 1 or not all(
            0.0 < share <= 1.0 for share in shares
        ):
            msg = "a rollout plan's counts must be at least 1, and its shares in (0, 1]"
            raise InvalidInputError(msg)
        if min(self.silence_s, self.total_s) <= 0.0 or self.soak_s < 0.0:
            msg = "a rollout plan's deadlines must be positive, and its soak time not negative"
            raise InvalidInputError(msg)

    def capacity(self, wave: int, known: int) -> float:
        """How many devices the wave may hold when ``known`` devices are known.

        >>> plan = Plan(waves=(1, 0.25, "rest"))
        >>> [plan.capacity(wave, 10) for wave in range(3)]
        [1, 3, inf]
        """
        size = self.waves[wave]
        if isinstance(size, str):
            return math.inf
        return size if isinstance(size, int) else ceil_share(size, known)

    @property
    def last(self) -> int:
        """Index of the last wave."""
        return len(self.waves) - 1


def ceil_share(share: float, count: int) -> int:
    """The least whole number that is at least ``share`` of ``count``.

    >>> ceil_share(0.9, 10), ceil_share(0.9, 2), ceil_share(0.07, 100)
    (9, 2, 7)
    """
    return math.ceil(share * count - 1e-9)


@dataclass(frozen=True)
class Device:
    """One device, as the cloud knows it. Times are seconds since the epoch."""

    name: str
    online: bool = False  # it holds a watch stream
    student: str = ""  # digest in service, as last told by the device
    release: int = 0  # version in service, as last told by the device
    sequence: int = 0  # of its latest report
    health: Health = Health.WAITING
    wave: int | None = None
    told_at: float = 0.0
    heard_at: float = 0.0
    committed_at: float = 0.0
    flaps: int = 0
    excused: bool = False  # failed before a person resumed the rollout; counts no more
    reason: str = ""  # of the failure

    @property
    def failed(self) -> bool:
        """Failed, or silent, which counts as failed."""
        return self.health in (Health.FAILED, Health.SILENT)


@dataclass(frozen=True)
class Content:
    """A release: its version and the digest of its student."""

    version: int
    student: str


@dataclass(frozen=True)
class Rollout:
    """The rollout of one channel's newest release, with all that is known of its devices."""

    channel: str
    version: int = 0  # 0: no release yet
    student: str = ""  # digest of the release's student
    plan: Plan = field(default_factory=Plan)
    phase: Phase = Phase.IDLE
    wave: int = 0  # the wave that is open
    complete: bool = False  # every wave got through, whatever came later
    reason: str = ""  # of a halt or abort
    began_at: float = 0.0
    stable: Content | None = None  # the newest release before this one whose rollout was done
    devices: Mapping[str, Device] = field(default_factory=dict)
    census: Census = field(default_factory=Census, compare=False, repr=False)
    """Follows from ``devices``; only :meth:`with_devices` changes both."""
    moved: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """The devices that the last event changed."""

    def __post_init__(self) -> None:
        if self.devices and not self.census:
            object.__setattr__(self, "census", take(self.devices.values(), self.version))

    def with_devices(self, *devices: Device) -> Rollout:
        """With these devices in the place of those of the same names; itself if none changed."""
        changed = {d.name: d for d in devices if self.devices.get(d.name) != d}
        if not changed:
            return self
        census = recount(self.census, self.devices, changed.values(), self.version)
        return replace(
            self,
            devices={**self.devices, **changed},
            census=census,
            moved=tuple(dict.fromkeys((*self.moved, *changed))),
        )

    def target(self, name: str) -> int:
        """The version that a device should run; 0: nothing to do.

        The release goes to devices that were told of it or run it already. Until its turn, a device
        that missed earlier releases is told of the newest one that is known to be good.
        """
        device = self.devices.get(name)
        if device is None or device.release > self.version:
            return 0
        open_ = self.phase in (Phase.RUNNING, Phase.PAUSED, Phase.DONE)
        if device.health is Health.COMMITTED or (open_ and device.wave is not None):
            return self.version
        if self.stable is not None and device.release < self.stable.version:
            return self.stable.version
        return 0

    def rollback(self) -> Content | None:
        """What a newer release has to bring back: None unless aborted after devices were told."""
        touched = any(
            d.wave is not None or d.release == self.version for d in self.devices.values()
        )
        return self.stable if self.phase is Phase.ABORTED and touched else None


def order(channel: str, version: int, device: str) -> str:
    """Sort key that puts a channel's devices in another stable order for each release.

    >>> order("home", 7, "attic") == order("home", 7, "attic") != order("home", 8, "attic")
    True
    """
    return hashlib.sha256(f"{channel}/{version}/{device}".encode()).hexdigest()


def dump_header(state: Rollout) -> str:
    """The state without its devices, as JSON."""
    header = {n: value for n, value in vars(state).items() if n not in _NOT_IN_HEADER}
    header["plan"] = vars(state.plan)
    header["stable"] = state.stable and vars(state.stable)
    return json.dumps({"schema": SCHEMA, **header})


def dump_device(device: Device) -> str:
    """One device as JSON."""
    return json.dumps({"schema": SCHEMA, **vars(device)})


def load(header: str, devices: Iterable[str]) -> Rollout:
    """Read what :func:`dump_header` and :func:`dump_device` wrote.

    Raises:
        IntegrityError: it is not such JSON, or of a newer schema.
    """
    try:
        fields = _fields(header)
        plan, stable = fields.pop("plan"), fields.pop("stable")
        plan["waves"] = tuple(plan["waves"])
        known = (_device(text) for text in devices)
        return Rollout(
            **{**fields, "phase": Phase(fields["phase"])},
            plan=Plan(**plan),
            stable=stable and Content(**stable),
            devices={device.name: device for device in known},
        )
    except (ValueError, TypeError, KeyError, AttributeError, InvalidInputError) as error:
        msg = (
            f"the stored rollout state is damaged ({error!r}): delete the channel's rows in "
            "rollout_channels and rollout_devices, and begin the newest release's rollout again"
        )
        raise IntegrityError(msg) from error


def _device(text: str) -> Device:
    fields = _fields(text)
    return Device(**{**fields, "health": Health(fields["health"])})


def _fields(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(text)
    if (schema := fields.pop("schema")) != SCHEMA:
        msg = f"its schema is {schema}, this program reads {SCHEMA}"
        raise ValueError(msg)
    return fields
