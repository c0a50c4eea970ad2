"""The guard: what it sees, what it does not, and how often it is wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from scipy.stats import binom, fisher_exact

from cloud.rollout.guard import (
    FIRST_LOOK,
    Alarm,
    Item,
    Judgement,
    Signal,
    evidence,
    judge,
    p_value,
)
from cloud.rollout.plan import Plan
from cloud.rollout.state import Device, Health, Phase, Rollout

OLD, NEW = "aa" * 32, "bb" * 32
ERROR, MARGIN = 0.05, 0.05


def items(bad: dict[str, int], good: dict[str, int]) -> tuple[Item, ...]:
    """So many bad and good items of each device, mixed."""
    found = [Item(d, bad=True) for d, n in bad.items() for _ in range(n)]
    found += [Item(d, bad=False) for d, n in good.items() for _ in range(n)]
    random.Random(0).shuffle(found)
    return tuple(found)


def corrected(before: tuple[Item, ...], after: tuple[Item, ...]) -> str | None:
    signal = Signal("judged answers were corrected", before, after)
    return judge([signal], error=ERROR, margin=MARGIN)


@pytest.mark.parametrize("table", [(7, 8, 2, 10), (3, 20, 1, 50), (0, 8, 3, 9), (5, 5, 5, 5)])
def test_one_device_is_fishers_exact_test(table: tuple[int, int, int, int]) -> None:
    bad, after, bad_before, before = table
    square = [[bad, after - bad], [bad_before, before - bad_before]]
    expected = fisher_exact(square, alternative="greater").pvalue
    assert p_value([table]) == pytest.approx(expected)


def test_one_item_each_is_mcnemars_exact_test() -> None:
    tables = [(1, 1, 0, 1)] * 6 + [(0, 1, 1, 1)] * 2 + [(1, 1, 1, 1)] * 5
    assert p_value(tables) == pytest.approx(binom.sf(5, 8, 0.5))


def test_more_corrections_on_several_devices_are_worse_and_the_reason_says_how() -> None:
    before = items({"hall": 2, "attic": 3}, {"hall": 20, "attic": 18})
    after = items({"hall": 7, "attic": 8}, {"hall": 1})
    reason = corrected(before, after)
    assert reason is not None
    assert "8 of 8 judged answers were corrected, on 2 devices, where 0.9 would be usual" in reason


def test_as_many_corrections_as_before_are_not_worse() -> None:
    before = items({"hall": 30, "attic": 3}, {"hall": 10, "attic": 30})
    assert corrected(before, before) is None


def test_one_home_alone_halts_nothing() -> None:
    before = items({}, {"hall": 30, "attic": 30})
    after = items({"hall": 64}, {"attic": 64})
    assert corrected(before, after) is None


def test_who_always_complains_and_now_speaks_more_often_is_no_worse() -> None:
    """Pooled, 20% were bad before and 83% after; each device is as it was."""
    before = items({"hall": 10, "attic": 9}, {"hall": 90, "attic": 1})
    after = items({"hall": 1, "attic": 90}, {"hall": 9, "attic": 10})
    assert corrected(before, after) is None


def test_too_little_evidence_says_nothing() -> None:
    before = items({}, {"hall": 100, "attic": 100})
    assert corrected(before, items({"hall": 4, "attic": FIRST_LOOK - 5}, {})) is None
    assert corrected(before, items({"hall": 4, "attic": FIRST_LOOK - 4}, {})) is not None
    assert corrected((), items({"hall": 50, "attic": 50}, {})) is None, "nothing to compare with"


def test_a_difference_below_the_margin_is_none_however_certain() -> None:
    before = items({"hall": 5000, "attic": 5000}, {"hall": 45_000, "attic": 45_000})
    after = items({"hall": 2200, "attic": 2200}, {"hall": 14_184, "attic": 14_184})
    signal = Signal("judged answers were corrected", before, after)
    assert judge([signal], error=ERROR, margin=0.05) is None
    assert judge([signal], error=ERROR, margin=0.0) is not None


def test_a_release_that_is_no_worse_is_halted_no_more_often_than_stated() -> None:
    """Looks at every count, three signals; seeded, so that it is the same each time."""
    dice = random.Random(4)
    halted = 0
    for _ in range(400):
        signals = []
        for _ in range(3):
            rates = {f"device-{n}": dice.random() for n in range(6)}

            def draw(count: int, rates: dict[str, float] = rates) -> tuple[Item, ...]:
                names = dice.choices(list(rates), k=count)
                return tuple(Item(d, bad=dice.random() < rates[d]) for d in names)

            signals.append(Signal("x", draw(60), draw(130)))
        halted += judge(signals, error=ERROR, margin=0.0) is not None
    assert halted / 400 <= ERROR


def rollout(devices: int) -> Rollout:
    known = [
        Device(f"device-{n}", wave=0, health=Health.COMMITTED, committed_at=1000.0 + n)
        for n in range(devices)
    ]
    return Rollout(
        "home",
        version=2,
        student=NEW,
        plan=Plan(guard_before_s=500.0),
        phase=Phase.RUNNING,
        began_at=1000.0,
        devices={d.name: d for d in known},
    )


def said(device: str, student: str, at: float) -> Judgement:
    return Judgement(device, student, at, corrected=True, schema_broken=False)


def test_evidence_is_of_devices_that_took_the_release_and_by_the_student_that_answered() -> None:
    state = rollout(2)
    state = state.with_devices(replace(state.devices["device-1"], committed_at=0.0))
    judgements = [
        said("device-0", OLD, 499.0),  # too long ago
        said("device-0", OLD, 501.0),
        said("device-0", OLD, 1500.0),  # sent late
        said("device-0", NEW, 999.0),  # an earlier release with this content
        said("device-0", NEW, 1001.0),
        said("device-1", NEW, 1001.0),  # did not take it
    ]
    corrections, schema, _ = evidence(state, judgements, [])
    assert [len(corrections.before), len(corrections.after)] == [2, 1]
    assert [i.bad for i in schema.before + schema.after] == [False] * 3


def test_alarms_count_once_a_device_and_those_that_had_one_before_say_nothing() -> None:
    state = rollout(16)
    alarms = [Alarm(name, NEW, 1100.0) for name in state.devices]
    had = [Alarm(name, OLD, 900.0) for name in state.devices]
    assert judge(evidence(state, [], alarms * 3), error=ERROR, margin=MARGIN) is not None
    assert judge(evidence(state, [], alarms + had), error=ERROR, margin=MARGIN) is None
    assert judge(evidence(state, [], alarms[:8]), error=ERROR, margin=MARGIN) is not None
    assert judge(evidence(rollout(7), [], alarms), error=ERROR, margin=MARGIN) is None
