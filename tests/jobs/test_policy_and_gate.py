"""When to adapt, and what to let pass: the pure rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.gate.gate import GateConfig, Scores, judge
from cloud.policy import PolicyConfig, Situation, decide

POLICY = PolicyConfig(demonstrations=100)


@pytest.mark.parametrize(
    ("situation", "adapt", "reason"),
    [
        (Situation(4, 2, 100), True, "2 of 4 devices drifted, 100 demonstrations"),
        (Situation(4, 1, 100), False, "no drift: 1 of 4 devices, 2 needed"),
        (Situation(5, 2, 100), False, "3 needed"),
        (Situation(0, 0, 100), False, "1 needed"),
        (Situation(4, 2, 99), False, "99 demonstrations of 100 needed"),
        (Situation(4, 4, 999, busy="rollout of release 3"), False, "busy: rollout of release 3"),
        (Situation(4, 4, 149, failed_with=100), False, "of 150 needed"),
        (Situation(4, 4, 150, failed_with=100), True, "150 demonstrations"),
        (Situation(4, 4, 100, failed_with=10), True, "100 demonstrations"),
    ],
)
def test_weights_are_learnt_only_when_it_is_worth_it(
    situation: Situation, adapt: bool, reason: str
) -> None:
    decision = decide(situation, POLICY)
    assert decision.adapt is adapt
    assert decision.layer == ("weights" if adapt else "context")
    assert reason in decision.reason


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.integers(0, 200))
def test_more_evidence_never_speaks_against_adapting(
    devices: int, drifted: int, unlearned: int, failed: int
) -> None:
    now = decide(Situation(devices, drifted, unlearned, "", failed), POLICY)
    more = decide(Situation(devices, drifted + 1, unlearned + 1, "", failed), POLICY)
    assert more.adapt or not now.adapt


def scores(new: float, earlier: float | None = None) -> Scores:
    return Scores(new, earlier, ())


@pytest.mark.parametrize(
    ("current", "candidate", "kl", "failed"),
    [
        (scores(0.0), scores(0.5), 0.1, []),
        (scores(0.0), scores(0.49), 0.1, ["new"]),
        (scores(0.9), scores(0.92), 0.1, ["new"]),  # no better than what serves
        (scores(1.0), scores(1.0), 0.1, []),  # it cannot be better
        (scores(0.0, 0.8), scores(0.6, 0.75), 0.1, []),
        (scores(0.0, 0.8), scores(0.6, 0.74), 0.1, ["earlier"]),
        (scores(0.0), scores(0.6), 0.21, ["base_kl"]),
        (scores(0.0), scores(0.6), float("nan"), ["base_kl"]),
        (scores(0.0, 1.0), scores(0.0, 0.0), 9.0, ["new", "earlier", "base_kl"]),
    ],
)
def test_a_candidate_passes_when_every_check_does(
    current: Scores, candidate: Scores, kl: float, failed: list[str]
) -> None:
    verdict = judge(current, candidate, kl, GateConfig())
    assert [c.name for c in verdict.checks if not c.passed] == failed
    assert verdict.passed is not bool(failed)


def test_earlier_skills_are_not_asked_before_there_are_any() -> None:
    names = [c.name for c in judge(scores(0.0), scores(1.0), 0.0, GateConfig()).checks]
    assert names == ["new", "base_kl"]
