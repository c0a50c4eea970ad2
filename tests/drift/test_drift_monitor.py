"""The monitor by scripted and by simulated devices; every simulation is seeded."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from edge.drift.monitor import DriftConfig, DriftMonitor
from edge.drift.vote import Kind
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from edge.drift.monitor import Alarm

CALM = 0.15  # nats


def live(
    monitor: DriftMonitor,
    rates: Iterable[float],
    *,
    rng: random.Random,
    surprise: float = CALM,
    breaks: float = 0.02,
) -> Iterator[Alarm | None]:
    """One command for each correction rate; yields what the monitor said of it."""
    for rate in rates:
        first = monitor.asked()
        name = str(rng.random())
        level = math.exp(rng.gauss(math.log(surprise), 0.7))
        second = monitor.answered(name, surprise=level, schema_broken=rng.random() < breaks)
        third = monitor.judged(name, corrected=True) if rng.random() < rate else None
        yield first or second or third


def first_alarm(rates: list[float], seed: int, config: DriftConfig | None = None) -> int | None:
    """Index of the first command with an alarm in a simulated life."""
    monitor = DriftMonitor(config=config or DriftConfig())
    said = live(monitor, rates, rng=random.Random(seed))
    return next((i for i, alarm in enumerate(said) if alarm), None)


@pytest.mark.parametrize("rate", [0.02, 0.10, 0.25])
def test_a_steady_student_raises_no_false_alarm(rate: float) -> None:
    runs = 250
    alarms = sum(first_alarm([rate] * 300, seed) is not None for seed in range(runs))
    assert alarms / runs / 3 < 0.005  # in each hundred commands


def test_a_steady_third_of_corrections_is_not_taken_for_drift_once_it_is_known() -> None:
    firsts = [first_alarm([0.35] * 300, seed) for seed in range(200)]
    assert sum(f is not None and f >= 100 for f in firsts) / 200 / 2 < 0.01


@pytest.mark.parametrize("before", [0.02, 0.10, 0.25])
@pytest.mark.parametrize("after", [0.9, 1.0])
def test_a_jump_is_found_within_thirty_commands_after_forty(before: float, after: float) -> None:
    delays = [first_alarm([before] * 40 + [after] * 30, seed) for seed in range(200)]
    assert all(d is not None and d >= 40 for d in delays)


def test_a_new_device_that_is_always_wrong_says_so_within_twenty_commands() -> None:
    assert first_alarm([1.0] * 20, 0) is not None


def test_a_jump_from_a_tenth_to_a_half_is_found() -> None:
    delays = [first_alarm([0.1] * 200 + [0.5] * 120, seed) for seed in range(100)]
    assert sum(d is not None for d in delays) >= 99


def test_an_operator_s_expectation_changes_what_is_acceptable() -> None:
    strict = DriftConfig(expected_corrections=0.05)
    lenient = DriftConfig(expected_corrections=0.5)
    rates = [0.7] * 60
    assert sum(first_alarm(rates, seed, strict) is not None for seed in range(50)) == 50
    assert sum(first_alarm(rates, seed, lenient) is not None for seed in range(50)) < 25


@pytest.mark.parametrize("bad", [0.0, -0.1, 0.6, math.nan])
def test_an_impossible_expectation_is_refused(bad: float) -> None:
    with pytest.raises(InvalidInputError, match="expected_corrections"):
        DriftConfig(expected_corrections=bad)


def test_new_inputs_are_told_from_changed_wishes() -> None:
    monitor = DriftMonitor(config=DriftConfig())
    rng = random.Random(3)
    assert not any(live(monitor, [0.0] * 100, rng=rng))
    found = [a for a in live(monitor, [0.0] * 60, rng=rng, surprise=2.0, breaks=0.6) if a]
    assert [a.kind for a in found] == [Kind.INPUT]
    assert {s.name for s in found[0].signals if s.alarmed} >= {"surprise"}


def test_answers_that_always_break_the_schema_are_drift_without_a_word_of_people() -> None:
    monitor = DriftMonitor(config=DriftConfig())
    said = live(monitor, [0.0] * 30, rng=random.Random(4), breaks=1.0)
    (alarm,) = [a for a in said if a]
    assert alarm.kind is Kind.INPUT


def test_surprise_and_corrections_together_are_both() -> None:
    monitor = DriftMonitor(config=DriftConfig())
    rng = random.Random(5)
    list(live(monitor, [0.35] * 150, rng=rng))
    kinds = [a.kind for a in live(monitor, [0.9] * 60, rng=rng, surprise=3.0) if a]
    assert kinds == [Kind.BOTH]


def test_an_alarm_is_raised_once_and_again_only_on_fresh_evidence() -> None:
    config = DriftConfig(cool_down=100)
    monitor = DriftMonitor(config=config)
    at = [i for i, a in enumerate(live(monitor, [1.0] * 260, rng=random.Random(6))) if a]
    assert len(at) == 3
    for one, following in pairwise(at):
        assert following - one > config.cool_down
    assert monitor.alarms[Kind.CONCEPT] == 3


def test_after_a_cool_down_without_harm_there_is_no_alarm() -> None:
    monitor = DriftMonitor(config=DriftConfig(cool_down=100))
    rng = random.Random(7)
    assert sum(a is not None for a in live(monitor, [1.0] * 20, rng=rng)) == 1
    assert not any(live(monitor, [0.05] * 400, rng=rng))
    assert not any(s.alarmed for s in monitor.states())


def test_a_swap_clears_everything() -> None:
    monitor = DriftMonitor(config=DriftConfig())
    rng = random.Random(8)
    list(live(monitor, [1.0] * 30, rng=rng))
    monitor.swapped()
    assert monitor.answers == 0
    assert all((s.alarmed, s.baseline, s.recent) == (False, None, None) for s in monitor.states())
    (alarm,) = [a for a in live(monitor, [1.0] * 30, rng=rng) if a]
    assert alarm.answered <= 20


def test_a_vote_that_stays_alone_is_overruled_and_its_level_becomes_normal() -> None:
    monitor = DriftMonitor(config=DriftConfig())
    rng = random.Random(9)
    list(live(monitor, [0.0] * 100, rng=rng))
    alarmed = []
    for said in live(monitor, [0.0] * 400, rng=rng, surprise=1.5):
        assert said is None
        alarmed.append(monitor.states()[0].alarmed)
    assert any(alarmed[:40])
    assert not any(alarmed[120:])


def test_a_report_says_what_was_normal_and_what_is_now() -> None:
    monitor = DriftMonitor(config=DriftConfig())
    rng = random.Random(10)
    list(live(monitor, [0.0] * 100, rng=rng))
    (alarm,) = [a for a in live(monitor, [1.0] * 20, rng=rng) if a]
    correction = next(s for s in alarm.signals if s.name == "correction")
    assert correction.alarmed
    assert correction.baseline == 0.0
    assert correction.recent is not None
    assert correction.recent > 0.3
    surprise = next(s for s in alarm.signals if s.name == "surprise")
    assert surprise.baseline == pytest.approx(CALM * math.exp(0.7**2 / 2), rel=0.3)
