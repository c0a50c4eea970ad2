"""The vote, the settling of answers, baselines and detectors: each alone."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from functools import partial
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from river import drift

from edge.drift import detector, settle
from edge.drift.baseline import LevelBaseline, RateBaseline
from edge.drift.detector import Detector, Fired, Limits
from edge.drift.vote import CORRECTION, SCHEMA, SIGNALS, SURPRISE, Ballot, Kind, Vote, tally


@pytest.mark.parametrize(
    ("signals", "kind"),
    [
        ((), None),
        ((SURPRISE,), None),
        ((SCHEMA,), None),
        ((CORRECTION,), Kind.CONCEPT),
        ((SURPRISE, SCHEMA), Kind.INPUT),
        ((SURPRISE, CORRECTION), Kind.BOTH),
        ((SCHEMA, CORRECTION), Kind.BOTH),
        (SIGNALS, Kind.BOTH),
    ],
)
def test_the_vote(signals: tuple[str, ...], kind: Kind | None) -> None:
    assert tally([Vote(s, age=0) for s in signals], Ballot()) is kind


def test_a_decisive_vote_is_enough_by_itself() -> None:
    assert tally([Vote(SCHEMA, age=0, decisive=True)], Ballot()) is Kind.INPUT


@given(st.integers(0, 200))
def test_a_vote_stands_for_the_window_only(age: int) -> None:
    votes = [Vote(SURPRISE, age=age), Vote(SCHEMA, age=0)]
    assert (tally(votes, Ballot(window=50)) is Kind.INPUT) == (age <= 50)


@given(st.lists(st.sampled_from(SIGNALS)), st.lists(st.sampled_from(SIGNALS)))
def test_more_votes_never_make_an_alarm_go_away(some: list[str], more: list[str]) -> None:
    before = tally([Vote(s, age=0) for s in some], Ballot())
    after = tally([Vote(s, age=0) for s in some + more], Ballot())
    assert before is None or after is not None


def test_an_operator_may_weigh_the_signals_otherwise() -> None:
    ballot = Ballot(correction=1, threshold=3)
    for votes in product((False, True), repeat=3):
        standing = [Vote(s, age=0) for s, on in zip(SIGNALS, votes, strict=True) if on]
        assert (tally(standing, ballot) is not None) == all(votes)


def test_who_asks_on_without_a_word_was_content() -> None:
    still_open = settle.answered(settle.answered((), "a"), "b")
    assert settle.asked_on(still_open) == ((), [settle.RIGHT, settle.RIGHT])
    assert settle.asked_on(()) == ((), [])


def test_every_answer_is_settled_as_right_at_most_once() -> None:
    still_open, learned = settle.judged(("a", "b"), "a", corrected=False)
    assert (still_open, learned) == (("b",), [settle.RIGHT])
    assert settle.asked_on(still_open) == ((), [settle.RIGHT])
    assert settle.judged((), "a", corrected=False) == ((), [])


def test_a_correction_counts_also_when_it_comes_late() -> None:
    assert settle.judged(("a",), "a", corrected=True) == ((), [settle.WRONG])
    assert settle.judged((), "a", corrected=True) == ((), [settle.WRONG])


def test_a_change_does_not_become_normal_before_the_lag_is_over() -> None:
    rate = RateBaseline(expected=0.2, weight=20, lag=30, capacity=200)
    for _ in range(60):
        rate.push(0.0)
    before = rate.excess(1.0)
    for _ in range(30):
        rate.push(1.0)
    assert rate.mean == 0.0
    assert rate.excess(1.0) >= before
    rate.push(1.0)
    assert rate.mean is not None
    assert rate.mean > 0


def test_a_full_baseline_is_frozen() -> None:
    rate = RateBaseline(expected=0.2, weight=20, lag=0, capacity=50)
    for _ in range(50):
        rate.push(0.0)
    for _ in range(500):
        rate.push(1.0)
    assert rate.mean == 0.0


def test_a_young_baseline_asks_for_more_than_an_old_one() -> None:
    young = RateBaseline(expected=0.2, weight=20, lag=0, capacity=200)
    old = RateBaseline(expected=0.2, weight=20, lag=0, capacity=200)
    for i in range(200):
        old.push(float(i % 5 == 0))
    assert young.excess(1.0) < old.excess(1.0)


def test_surprise_is_measured_in_its_own_deviations() -> None:
    rng = random.Random(0)
    quiet = LevelBaseline(least=20, lag=0, capacity=200)
    wild = LevelBaseline(least=20, lag=0, capacity=200)
    for _ in range(200):
        quiet.push(math.exp(rng.gauss(-2, 0.2)))
        wild.push(math.exp(rng.gauss(-2, 1.0)))
    three_fold = 3 * math.exp(-2)
    assert wild.excess(three_fold) is not None
    assert (wild.excess(three_fold) or 0) < 1.5 < (quiet.excess(three_fold) or 0)
    assert quiet.excess(1e6) == LevelBaseline.CAP


def test_equal_levels_are_no_trouble() -> None:
    level = LevelBaseline(least=5, lag=0, capacity=200)
    for _ in range(50):
        level.push(0.0)
    assert level.excess(0.0) is not None
    assert (level.excess(0.0) or 0.0) <= 0.0


def correction_detector() -> Detector:
    baseline = partial(RateBaseline, expected=0.2, weight=20, lag=30, capacity=200)
    return Detector(limits=Limits(slack=0.5, shift=12.5, expected=0.2), baseline=baseline)


def surprise_detector() -> Detector:
    baseline = partial(LevelBaseline, least=20, lag=30, capacity=200)
    return Detector(limits=Limits(slack=0.5, shift=12), baseline=baseline)


def test_improvement_is_no_drift() -> None:
    rng = random.Random(1)
    corrections, levels = correction_detector(), surprise_detector()
    for i in range(400):
        rate, level = (0.5, -1.0) if i < 30 else (0.0, -4.0)
        corrections.observe(float(rng.random() < rate))
        assert levels.observe(math.exp(rng.gauss(level, 0.3))) is None


def test_a_rise_of_surprise_is_found_and_is_never_decisive() -> None:
    rng = random.Random(2)
    detector = surprise_detector()
    for _ in range(100):
        assert detector.observe(math.exp(rng.gauss(-2, 0.5))) is None
    found = [detector.observe(math.exp(rng.gauss(-0.5, 0.5))) for _ in range(30)]
    assert Fired(decisive=False) in found


def test_each_test_of_a_detector_speaks_once_until_it_is_rearmed() -> None:
    detector = correction_detector()
    for _ in range(2):
        said = [f for f in (detector.observe(1.0) for _ in range(100)) if f]
        assert said == [Fired(decisive=False), Fired(decisive=True)]
        detector.rearm()


def test_what_comes_after_a_vote_does_not_become_normal() -> None:
    detector = correction_detector()
    for value in [0.0] * 50 + [1.0] * 300:
        detector.observe(value)
    assert detector.baseline == 0.0


def test_a_restarted_detector_has_forgotten_what_was_normal() -> None:
    detector = correction_detector()
    for _ in range(100):
        detector.observe(0.0)
    assert (detector.baseline, detector.recent) == (0.0, 0.0)
    detector.restart()
    assert (detector.baseline, detector.recent) == (None, None)


def test_a_device_loads_of_river_its_one_test_only() -> None:
    program = (
        "import sys, edge.drift.detector as d; d._cusum(0.5, 1.0);"
        "print({'scipy.stats', 'pandas', 'sqlalchemy'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "set()"


@given(st.lists(st.floats(-3, 3), max_size=60))
def test_that_test_says_what_rivers_package_says(values: list[float]) -> None:
    settings: dict[str, Any] = {"min_instances": 1, "delta": 0.5, "threshold": 3.0, "mode": "up"}
    ours: Any = detector._page_hinkley()(**settings)
    theirs: Any = drift.PageHinkley(**settings)
    for value in values:
        ours.update(value)
        theirs.update(value)
        assert ours.drift_detected == theirs.drift_detected
