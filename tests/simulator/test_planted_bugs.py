"""Each invariant can break: the simulator sees bugs planted in the rules, and around them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cloud.rollout import devices, guard, waves
from cloud.rollout.census import Standing
from cloud.rollout.plan import Plan
from cloud.rollout.state import SCHEMA
from edge.update import decide
from edge.update.machine import advance
from tests.simulator import simulator_cloud, simulator_ledger
from tests.simulator.simulator_ledger import BrokenInvariantError
from tests.simulator.simulator_scenario import Bug, draw
from tests.simulator.simulator_world import run

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from cloud.rollout.state import Device

_SEEDS = range(2000)


def caught(bugs: Collection[Bug] = ()) -> tuple[BrokenInvariantError, int]:
    """What the first scenario that sees the bug says, and its seed."""
    for seed in _SEEDS:
        try:
            run(draw(seed), bugs=bugs)
        except BrokenInvariantError as error:
            return error, seed
    pytest.fail(f"no scenario of {len(_SEEDS)} sees the planted bug")


@pytest.mark.parametrize(
    ("bug", "invariant"),
    [
        (Bug.BUILDS_IN_PLACE, simulator_ledger.SERVABLE),
        (Bug.TRUSTS_ANYBODY, simulator_ledger.SIGNED),
        (Bug.FORGETS_FLOOR, simulator_ledger.NEWER),
        (Bug.TRUSTS_FOLDERS, simulator_ledger.WHOLE),
        (Bug.DROPS_AT_SEND, simulator_ledger.EVIDENCE),
        (Bug.ANSWERS_FIRST, simulator_ledger.EVIDENCE),
        (Bug.STORES_LATE, simulator_ledger.STORED),
        (Bug.NO_GUARD, simulator_ledger.GUARD),
    ],
)
def test_a_bug_of_a_device_or_the_cloud_is_caught(bug: Bug, invariant: str) -> None:
    error, seed = caught([bug])
    assert error.invariant == invariant
    assert f"SIMULATOR_SEED={seed} " in str(error)


def _forgets_excuses(device: Device) -> str:
    return json.dumps({"schema": SCHEMA, **vars(replace(device, excused=False))})


def _takes_anybody(standing: Standing) -> bool:
    return standing.wave is None and standing.health in ("waiting", "committed")


def _probes_for_ever(*args: object, probe_starts: int, **kwargs: object) -> object:
    del probe_starts
    return advance(*args, probe_starts=0, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "name", "wrong", "invariant"),
    [
        (waves, "why_halt", lambda *_: None, simulator_ledger.LIMIT),
        (Plan, "needed", lambda *_: 0, simulator_ledger.LIMIT),
        (waves, "is_through", lambda *_: True, simulator_ledger.LIMIT),
        (waves, "_is_proven", lambda *_: True, simulator_ledger.LIMIT),
        (devices, "passed", lambda device, *_: device, simulator_ledger.END),
        (waves, "_why_nobody", lambda *_: None, simulator_ledger.END),
        (Plan, "may_begin", lambda *_: True, simulator_ledger.WINDOW),
        (Plan, "may_begin", lambda *_: False, simulator_ledger.END),
        (Plan, "may_join", lambda *_: 99, simulator_ledger.AT_ONCE),
        (Standing, "candidate", property(_takes_anybody), simulator_ledger.HELD),
        (guard, "p_value", lambda _: 1.0, simulator_ledger.GUARD),
        (guard._Tables, "worse", lambda *_: "no reason at all", simulator_ledger.GUARD),
        (decide, "advance", _probes_for_ever, simulator_ledger.END),
        (simulator_cloud, "dump_device", _forgets_excuses, simulator_ledger.STORED),
    ],
)
def test_a_bug_of_the_rules_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    name: str,
    wrong: Callable[..., object],
    invariant: str,
) -> None:
    monkeypatch.setattr(module, name, wrong)
    error, seed = caught()
    assert error.invariant == invariant
    assert f"SIMULATOR_SEED={seed} " in str(error)
