"""What is known about the rollout of a channel's newest release: plain data, and its JSON.

The rules that change it are in :mod:`cloud.rollout.machine`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from cloud.rollout.census import Census, recount, take
from cloud.rollout.plan import Plan, plan_of
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SCHEMA: Final = 2
_READ_SCHEMAS: Final = (1, 2)  # what 2 added has defaults
_NOT_IN_HEADER: Final = ("devices", "census", "moved")


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
    pinned: int | None = None  # the version that a person holds it at
    strikes: int = 0  # failures, over all releases, since its last clean update
    boxed_until: float = 0.0  # in the penalty box until then; 0: it is not

    @property
    def failed(self) -> bool:
        """Failed, or silent, which counts as failed."""
        return self.health in (Health.FAILED, Health.SILENT)

    @property
    def aside(self) -> bool:
        """Whether no wave may take it: a person holds it, or it is in the penalty box."""
        return self.pinned is not None or self.boxed_until > 0.0


@dataclass(frozen=True)
class Content:
    """A release: its version and the digest of its student."""

    version: int
    student: str


@dataclass(frozen=True)
class Wanted:
    """What a person ordered to be rolled out, in a newer release; ``plan`` None: the usual one."""

    content: Content
    plan: Plan | None = None


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
    ordered: Wanted | None = None  # not published yet
    by_guard: bool = False  # the guard halted it; once a person resumed, the guard is silent
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
        if device.pinned is not None:
            return self._pinned(device, device.pinned)
        open_ = self.phase in (Phase.RUNNING, Phase.PAUSED, Phase.DONE)
        if device.health is Health.COMMITTED:
            return self.version
        if device.aside:
            return 0
        if open_ and device.wave is not None:
            return self.version
        # Where a plan bounds when devices update, or how many, they wait for their turn.
        missed = self.stable is not None and device.release < self.stable.version
        return self.stable.version if self.stable and missed and not self.plan.bounded else 0

    def _pinned(self, device: Device, pin: int) -> int:
        given_up = pin == self.version and self.phase in (Phase.HALTED, Phase.ABORTED)
        return pin if device.release == pin or (device.release < pin and not given_up) else 0

    def wanted(self) -> Wanted | None:
        """What a newer release has to bring: what a person ordered, else what an abort undoes.

        An abort undoes nothing when no device was told of the release.
        """
        if self.ordered is not None or self.phase is not Phase.ABORTED or self.stable is None:
            return self.ordered
        touched = any(
            d.wave is not None or d.release == self.version for d in self.devices.values()
        )
        return Wanted(self.stable) if touched else None


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
    if (ordered := state.ordered) is not None:
        header["ordered"] = dump_wanted(ordered)
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
        ordered = fields.pop("ordered", None)
        known = (_device(text) for text in devices)
        return Rollout(
            **{**fields, "phase": Phase(fields["phase"])},
            plan=plan_of(plan),
            stable=stable and Content(**stable),
            ordered=ordered and load_wanted(ordered),
            devices={device.name: device for device in known},
        )
    except (ValueError, TypeError, KeyError, AttributeError, InvalidInputError) as error:
        msg = (
            f"the stored rollout state is damaged ({error!r}): delete the channel's rows in "
            "rollout_channels and rollout_devices, and begin the newest release's rollout again"
        )
        raise IntegrityError(msg) from error


def dump_wanted(wanted: Wanted) -> dict[str, Any]:
    """As JSON holds it."""
    plan = wanted.plan and vars(wanted.plan)
    return {"content": vars(wanted.content), "plan": plan}


def load_wanted(values: dict[str, Any]) -> Wanted:
    """Read what :func:`dump_wanted` gave.

    Raises:
        InvalidInputError: its plan is none.
        KeyError: something is missing.
        TypeError: likewise.
    """
    plan = values["plan"]
    return Wanted(Content(**values["content"]), plan and plan_of(plan))


def _device(text: str) -> Device:
    fields = _fields(text)
    return Device(**{**fields, "health": Health(fields["health"])})


def _fields(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(text)
    if (schema := fields.pop("schema")) not in _READ_SCHEMAS:
        msg = f"its schema is {schema}, this program reads up to {SCHEMA}"
        raise ValueError(msg)
    return fields
