"""Drift detection measured by simulation: false alarms, delay and misses, beside dummies and peers.

Run ``python bench/drift.py``; it writes ``build/bench/drift.json`` and prints a table.

A run is one simulated device: each command is corrected with a probability that may jump. Surprise
is log-normal around 0.15 nats and does not move with the jump unless a scenario says so; 2% of
answers break the schema. Everything is seeded: run ``i`` of each scenario uses seed ``i``.

- false alarm probability: share of runs with an alarm in each hundred commands without a change;
- MTFA: mean number of commands between false alarms (commands seen, where there was none);
- MTD: mean number of commands from the jump to the alarm, of the runs that had one in time;
- MDR: share of runs without an alarm within 60 commands of the jump;
- MTR: MTFA / MTD * (1 - MDR), after Bifet (ECML PKDD 2017).
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from river.drift import ADWIN, PageHinkley
from river.drift.binary import DDM, HDDMA

from edge.drift.monitor import DriftConfig, DriftMonitor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BAR = 60
STEADY = 300
RATES = (0.02, 0.10, 0.25, 0.35)
SCHEMA_BREAKS = 0.02
RUNS = 4000
PEER_RUNS = 400


@dataclass(frozen=True)
class Jump:
    """A scenario: ``before`` commands at rate ``low``, then ``high``, which may ebb to ``ebb``."""

    before: int
    low: float
    high: float
    ebb: float | None = None
    surprise: float = 1.0

    def rate(self, since: int) -> float:
        """Correction rate ``since`` commands after the jump; it ebbs linearly over 40."""
        if self.ebb is None:
            return self.high
        return self.high + (self.ebb - self.high) * min(1.0, since / 40)


JUMPS = (
    Jump(0, 0.2, 1.0),
    Jump(0, 0.2, 0.9),
    Jump(40, 0.02, 0.9),
    Jump(40, 0.10, 0.9),
    Jump(40, 0.10, 1.0),
    Jump(40, 0.25, 0.9),
    Jump(40, 0.25, 1.0),
    Jump(40, 0.35, 0.9),
    Jump(100, 0.35, 0.9),
    Jump(200, 0.35, 0.9),
    Jump(100, 0.35, 0.9, surprise=3.0),
    Jump(100, 0.25, 1.0, ebb=0.6),
    Jump(100, 0.35, 1.0, ebb=0.6),
    Jump(100, 0.10, 0.5),
    Jump(200, 0.10, 0.5),
    Jump(200, 0.10, 0.5, surprise=3.0),
)


class Watcher(Protocol):
    """What is compared: told of one command, says whether it raises an alarm."""

    def step(self, *, surprise: float, schema: bool, corrected: bool) -> bool:
        """Take one command."""
        ...


class Vote:
    """This project's monitor."""

    def __init__(self) -> None:
        self._monitor = DriftMonitor(config=DriftConfig())
        self._n = 0

    def step(self, *, surprise: float, schema: bool, corrected: bool) -> bool:
        """Ask, be answered, and perhaps correct."""
        self._n += 1
        name = str(self._n)
        alarms = [
            self._monitor.asked(),
            self._monitor.answered(name, surprise=surprise, schema_broken=schema),
        ]
        if corrected:
            alarms.append(self._monitor.judged(name, corrected=True))
        return any(alarms)


class EveryHundred:
    """A dummy that fires every 100 commands."""

    def __init__(self) -> None:
        self._n = 0

    def step(self, *, surprise: float, schema: bool, corrected: bool) -> bool:
        """Count."""
        del surprise, schema, corrected
        self._n += 1
        return self._n % 100 == 0


class Never:
    """A dummy that never fires."""

    def step(self, *, surprise: float, schema: bool, corrected: bool) -> bool:
        """Do nothing."""
        del surprise, schema, corrected
        return False


class Bare:
    """A detector of River by itself, on corrections, with its defaults; it may fire any way."""

    def __init__(self, kind: Any, **options: float) -> None:  # noqa: ANN401 - River is not typed
        self._detector = kind(**options)

    def step(self, *, surprise: float, schema: bool, corrected: bool) -> bool:
        """Feed the correction."""
        del surprise, schema
        self._detector.update(int(corrected))
        return bool(self._detector.drift_detected)


WATCHERS: dict[str, tuple[int, Callable[[], Watcher]]] = {
    "anabranch": (RUNS, Vote),
    "dummy: every 100": (PEER_RUNS, EveryHundred),
    "dummy: never": (PEER_RUNS, Never),
    "ADWIN, clock 1": (PEER_RUNS, lambda: Bare(ADWIN, clock=1)),
    "Page-Hinkley": (PEER_RUNS, lambda: Bare(PageHinkley)),
    "DDM": (PEER_RUNS, lambda: Bare(DDM)),
    "HDDM_A": (PEER_RUNS, lambda: Bare(HDDMA)),
}


def alarms(
    watcher: Watcher, rates: Iterator[float], louder: Iterator[float], seed: int
) -> Iterator[int]:
    """Indices of the commands at which ``watcher`` fires."""
    rng = random.Random(seed)
    for i, (rate, factor) in enumerate(zip(rates, louder, strict=False)):
        surprise = factor * math.exp(rng.gauss(math.log(0.15), 0.7))
        if watcher.step(
            surprise=surprise, schema=rng.random() < SCHEMA_BREAKS, corrected=rng.random() < rate
        ):
            yield i


def steady(make: Callable[[], Watcher], rate: float, runs: int) -> dict[str, Any]:
    """False alarms at one correction rate."""
    first = [0] * (STEADY // 100)
    total = 0
    for seed in range(runs):
        fired = list(alarms(make(), iter([rate] * STEADY), iter([1.0] * STEADY), seed))
        total += len(fired)
        if fired:
            first[fired[0] // 100] += 1
    return {
        "rate": rate,
        "runs": runs,
        "false_alarm_per_100": [n / runs for n in first],
        "alarms": total,
        "mtfa": runs * STEADY / max(1, total),
    }


def jump(make: Callable[[], Watcher], scenario: Jump, runs: int) -> dict[str, Any]:
    """Delay and misses after one jump; runs with an alarm before it are left out and counted."""
    delays: list[int | None] = []
    early = 0
    after = 120
    for seed in range(runs):
        rates = [scenario.low] * scenario.before + [scenario.rate(n) for n in range(after)]
        louder = [1.0] * scenario.before + [scenario.surprise] * after
        first = next(alarms(make(), iter(rates), iter(louder), seed), None)
        if first is not None and first < scenario.before:
            early += 1
        else:
            delays.append(None if first is None else first - scenario.before + 1)
    in_time = sorted(d for d in delays if d is not None and d <= BAR)
    known = max(1, len(delays))
    return asdict(scenario) | {
        "runs": runs,
        "early": early,
        "mtd": sum(in_time) / len(in_time) if in_time else None,
        "p999": in_time[min(len(in_time) - 1, int(0.999 * len(in_time)))] if in_time else None,
        "mdr": 1 - len(in_time) / known,
        "missed_in_30": sum(d is None or d > BAR // 2 for d in delays) / known,
    }


def main() -> None:
    """Measure everything, print it, write it."""
    started = time.monotonic()
    report: dict[str, Any] = {"bar": BAR, "steady_commands": STEADY, "seeds": "0 .. runs-1"}
    for name, (runs, make) in WATCHERS.items():
        still = [steady(make, rate, runs) for rate in RATES]
        jumps = [jump(make, scenario, runs) for scenario in JUMPS]
        mtfa = sum(s["runs"] * STEADY for s in still) / max(1, sum(s["alarms"] for s in still))
        found = [j for j in jumps if j["mtd"] is not None]
        mtd = sum(j["mtd"] for j in found) / len(found) if found else None
        mdr = sum(j["mdr"] for j in jumps) / len(jumps)
        report[name] = {
            "steady": still,
            "jumps": jumps,
            "mtfa": mtfa,
            "mtd": mtd,
            "mdr": mdr,
            "mtr": mtfa / mtd * (1 - mdr) if mtd else 0.0,
        }
        print(f"{name}: MTFA {mtfa:.0f}  MTD {mtd or math.nan:.1f}  MDR {mdr:.4f}")
        for s in still:
            shares = "  ".join(f"{100 * p:.2f}%" for p in s["false_alarm_per_100"])
            print(f"   steady {s['rate']:.2f}: false alarm in each 100: {shares}")
        for j in jumps:
            print(
                f"   {j['before']:>3} at {j['low']:.2f} -> {j['high']:.2f}"
                f"{'' if j['ebb'] is None else ' ebbing to ' + str(j['ebb'])}"
                f"{'' if j['surprise'] == 1 else ' surprise x' + str(j['surprise'])}:"
                f" MTD {j['mtd'] or math.nan:.1f}  99.9% by {j['p999']}  MDR {j['mdr']:.4f}"
                f"  missed in 30: {j['missed_in_30']:.4f}  early {j['early']}"
            )
    report["seconds"] = time.monotonic() - started
    target = Path("build/bench/drift.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{target} after {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
