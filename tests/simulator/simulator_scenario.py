"""What a scenario consists of, all of it drawn from its seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
from random import Random
from typing import Any

from cloud.rollout.plan import Plan

START = 1_800_000_000.0
FAULTS_S = 200.0
"""How long faults last, in seconds; releases begin and people intervene in this time."""

PLANS: tuple[tuple[int | float | str, ...], ...] = (
    (1, "rest"),
    (2, 0.5, "rest"),
    (1, 1, 1, "rest"),
    (0.25, "rest"),
    ("rest",),
)
_WINDOWS = (
    ("08:01-08:02", "08:03-08:10"),
    ("13:31-13:32", "13:33-13:40"),  # the same minutes in Kolkata
    ("23:00-08:01",),
)  # around START, which is 08:00 UTC


class Kind(StrEnum):
    """What a release does to a device."""

    GOOD = "good"
    BAD = "bad"  # its probe fails
    DEADLY = "deadly"  # its probe takes the process down
    DISLIKED = "disliked"  # it serves, and people correct it until drift is noticed
    FLAPPING = "flapping"  # it serves, takes the process down later, and often does not open again


_KINDS = (Kind.GOOD,) * 3 + (Kind.BAD,) * 2 + (Kind.DEADLY, Kind.DISLIKED, Kind.FLAPPING)


class Bug(Enum):
    """A fault planted in the simulated device or cloud; those in the rules are patched in."""

    BUILDS_IN_PLACE = auto()  # the new slot is written over the one in service
    TRUSTS_ANYBODY = auto()  # signatures are not checked
    TRUSTS_FOLDERS = auto()  # a slot that is there is taken for whole
    FORGETS_FLOOR = auto()  # of releases, only the one in service is compared
    DROPS_AT_SEND = auto()  # a demonstration leaves the outbox when it is sent
    ANSWERS_FIRST = auto()  # the cloud acknowledges, then stores
    STORES_LATE = auto()  # the cloud tells devices, then stores what it told
    NO_GUARD = auto()  # nobody looks at what people say of a release


@dataclass(frozen=True)
class Release:
    """A release as it is offered; ``signed`` by the key that devices trust."""

    version: int
    student: str
    kind: Kind
    signed: bool = True


@dataclass(frozen=True)
class Scenario:
    """A fleet, its plan, and how often things go wrong (shares, or a mean for each device)."""

    seed: int
    devices: int
    plan: Plan
    loss: float
    duplicate: float
    delay: float
    crashes: float  # of a device, while faults last
    cuts: float  # of a device's line
    cloud_crashes: float
    impostor: float  # share of manifests that come from an impostor
    wrong_bytes: float  # share of downloads
    full_disks: float  # of a device
    altered: float  # slots altered on the disk, of a device
    skew: float  # of clocks, in seconds
    orders: float  # interventions of people
    kinds: tuple[Kind, ...]  # of its releases, one after another
    demonstrations: float  # of a device
    pins: float  # devices that people pin, let go, or take out of the penalty box


def draw(seed: int, *, devices: int | None = None) -> Scenario:
    """The scenario of a seed.

    Few devices show nearly all that many show, and cost little: one scenario in sixty has dozens,
    one in five hundred has hundreds.
    """
    random = Random(seed)

    def some(often: float, most: float) -> float:
        return random.uniform(0.0, most) if random.random() < often else 0.0

    size = random.random()
    if devices is None:
        small = random.choice((1, 1, 1, 2, 2, 2, 2, 3, 3, 4))
        dozens, hundreds = random.randint(8, 24), random.randint(100, 250)
        devices = hundreds if size < 0.002 else dozens if size < 0.018 else small
    scenario = Scenario(
        seed=seed,
        devices=devices,
        plan=_plan(random),
        loss=some(0.6, 0.3),
        duplicate=some(0.5, 0.3),
        delay=random.choice((0.05, 0.3, 2.0)),
        crashes=some(0.6, 3.0),
        cuts=some(0.6, 3.0),
        cloud_crashes=some(0.5, 4.0),
        impostor=some(0.4, 0.3),
        wrong_bytes=some(0.3, 0.5),
        full_disks=some(0.2, 1.0),
        altered=some(0.4, 3.0),
        skew=some(0.4, 3600.0),
        orders=some(0.5, 6.0),
        kinds=tuple(random.choices(_KINDS, k=random.choice((1, 2, 2, 3, 5)))),
        demonstrations=random.choice((0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 16.0)),
        pins=some(0.3, 4.0),
    )
    return _talkative(scenario) if random.random() < 0.015 else scenario


def _talkative(scenario: Scenario) -> Scenario:
    """People say much, nobody steps in, and a wave takes long enough for the guard to listen."""
    plan = replace(
        scenario.plan, waves=(0.5, "rest"), soak_s=150.0, windows=(), max_updating=0
    )  # fmt: skip
    return replace(
        scenario,
        plan=plan,
        devices=max(4, min(scenario.devices, 8)),
        kinds=(Kind.DISLIKED,),
        demonstrations=40.0,
        orders=0.0,
        pins=0.0,
    )


def _plan(random: Random) -> Plan:
    fields: dict[str, Any] = {
        "waves": random.choice(PLANS),
        "min_committed": random.randint(1, 3),
        "min_healthy_share": random.choice((0.3, 0.5, 0.9, 1.0)),
        "halt_failures": random.randint(1, 4),
        "halt_share": random.choice((0.1, 0.2, 0.5)),
        "silence_s": 60.0,
        "total_s": 150.0,
        "soak_s": random.choice((0.0, 0.0, 20.0, 120.0)),
        "max_flaps": random.randint(1, 3),
        "max_updating": random.choice((0, 0, 0, 1, 2)),
        "windows": random.choice((*((),) * 5, *_WINDOWS)),
        "time_zone": random.choice(("UTC", "UTC", "Asia/Kolkata")),
        "box_failures": random.randint(1, 4),
        "box_s": random.choice((30.0, 300.0)),
        "box_max_s": 1000.0,
    }
    return Plan(**fields)


def times(random: Random, mean: float, *, until: float) -> list[float]:
    """Moments of a Poisson process with ``mean`` of them before ``until`` seconds."""
    moments: list[float] = []
    at = 0.0
    while mean > 0.0 and (at := at + random.expovariate(mean / until)) < until:
        moments.append(at)
    return moments
