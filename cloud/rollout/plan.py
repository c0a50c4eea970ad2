"""How careful a rollout is."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from cloud.rollout import windows
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

REST: Final = "rest"


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
    max_updating: int = 0
    """At most so many devices update at once; 0: as many as the wave holds."""
    windows: tuple[str, ...] = ()
    """Local hours in which a device may begin, such as "02:00-05:00"; none: always."""
    time_zone: str = "UTC"
    """IANA name of the zone that the windows are in."""
    box_failures: int = 3
    """A device that failed so often without a clean update between goes to the penalty box..."""
    box_s: float = 3600.0
    """...for this long, twice as long with each failure more..."""
    box_max_s: float = 604_800.0
    """...but never longer than this."""
    guard_error: float = 0.05
    """The guard halts a release that is no worse with at most this probability; 0: no guard."""
    guard_margin: float = 0.05
    """By how much more of people's feedback, or of devices, must be bad for the guard to halt."""
    guard_before_s: float = 604_800.0
    """How far back the guard looks for what was usual; it acts no longer than that, either."""

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
        counts = (self.min_committed, self.halt_failures, self.max_flaps, self.box_failures)
        if min(*counts, self.max_updating + 1) < 1 or not all(0.0 < s <= 1.0 for s in shares):
            msg = "a rollout plan's counts must be at least 1, and its shares in (0, 1]"
            raise InvalidInputError(msg)
        deadlines = (self.silence_s, self.total_s, self.box_s, self.box_max_s, self.guard_before_s)
        if min(deadlines) <= 0.0 or self.soak_s < 0.0:
            msg = "a rollout plan's deadlines must be positive, and its soak time not negative"
            raise InvalidInputError(msg)
        if not (0.0 <= self.guard_error < 0.5 and 0.0 <= self.guard_margin < 1.0):  # noqa: PLR2004
            msg = "a rollout plan's guard_error must be in [0, 0.5), its guard_margin in [0, 1)"
            raise InvalidInputError(msg)
        windows.is_open(self.windows, self.time_zone, 0.0)
        windows.zone(self.time_zone)

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

    def needed(self, members: int) -> int:
        """How many of a wave's members must commit.

        >>> Plan(min_committed=2, min_healthy_share=0.5).needed(10)
        5
        """
        least = min(self.min_committed, members)
        return max(1, least, ceil_share(self.min_healthy_share, members))

    def may_begin(self, now: float) -> bool:
        """Whether a maintenance window is open (``now`` in seconds since the epoch)."""
        return windows.is_open(self.windows, self.time_zone, now)

    def may_join(self, updating: int) -> float:
        """How many more devices may begin while so many update.

        >>> Plan(max_updating=3).may_join(2), Plan().may_join(2)
        (1, inf)
        """
        return max(0, self.max_updating - updating) if self.max_updating else math.inf

    def box_seconds(self, strikes: int) -> float:
        """How long a device is set aside that has failed so often; 0: not at all.

        >>> [Plan().box_seconds(strikes) for strikes in (2, 3, 4, 40)]
        [0.0, 3600.0, 7200.0, 604800.0]
        """
        over = strikes - self.box_failures
        if over < 0:
            return 0.0
        return float(min(self.box_max_s, self.box_s * 2.0 ** min(over, 64)))

    @property
    def last(self) -> int:
        """Index of the last wave."""
        return len(self.waves) - 1

    @property
    def bounded(self) -> bool:
        """Whether it bounds when devices update, or how many at once."""
        return bool(self.windows or self.max_updating)


def read_plan(path: Path) -> Plan:
    """Read a plan from a TOML file whose keys are :class:`Plan`'s.

    Raises:
        InvalidInputError: it cannot be read, or is no plan.
    """
    try:
        return plan_of(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        msg = f"{path} is no rollout plan: {error}"
        raise InvalidInputError(msg) from error


def plan_of(values: dict[str, Any]) -> Plan:
    """The plan of a TOML or JSON object.

    Raises:
        InvalidInputError: a key is not :class:`Plan`'s, or a value is of another type.
    """
    kinds: dict[str, tuple[type, ...]] = {
        f.name: {"int": (int,), "float": (int, float), "str": (str,)}.get(
            str(f.type), (list, tuple)
        )
        for f in fields(Plan)
    }
    for name, value in values.items():
        if name not in kinds:
            msg = f"a rollout plan has no {name!r}: choose from {', '.join(sorted(kinds))}"
            raise InvalidInputError(msg)
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            msg = f"{name} of a rollout plan cannot be {value!r}"
            raise InvalidInputError(msg)
    taken: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    if not all(isinstance(window, str) for window in taken.get("windows", ())):
        msg = f'windows of a rollout plan are texts such as "02:00-05:00", not {taken["windows"]}'
        raise InvalidInputError(msg)
    return Plan(**taken)


def ceil_share(share: float, count: int) -> int:
    """The least whole number that is at least ``share`` of ``count``.

    >>> ceil_share(0.9, 10), ceil_share(0.9, 2), ceil_share(0.07, 100)
    (9, 2, 7)
    """
    return math.ceil(share * count - 1e-9)
