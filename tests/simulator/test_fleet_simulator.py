"""Simulated fleets: in ten thousand scenarios, and after every event of each, the invariants hold.

A scenario is all in its seed. To replay one, with its story printed:
``SIMULATOR_SEED=123 .venv/bin/pytest tests/simulator -k replay -s``.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from cloud.rollout.plan import Plan
from cloud.rollout.state import Phase
from tests.simulator.simulator_scenario import Kind, draw
from tests.simulator.simulator_world import World, run

SCENARIOS = 10_000
THOUSANDS = 2000
_CHUNK = 500


@pytest.mark.parametrize("first", range(0, SCENARIOS, _CHUNK))
def test_no_invariant_breaks_in_seeded_scenarios(first: int) -> None:
    for seed in range(first, first + _CHUNK):
        run(draw(seed))


def test_no_invariant_breaks_with_thousands_of_devices() -> None:
    plan = Plan(waves=(5, 0.05, "rest"), min_healthy_share=0.5, halt_failures=500, halt_share=0.5)
    scenario = replace(draw(11, devices=THOUSANDS), kinds=(Kind.GOOD,), cloud_crashes=2.0)
    world = run(replace(scenario, plan=replace(plan, silence_s=60.0, total_s=150.0)))
    rollout = world.cloud.state
    assert (rollout.phase, rollout.wave) == (Phase.DONE, 2)
    assert len(rollout.devices) == THOUSANDS


def test_a_seed_always_tells_the_same_story() -> None:
    stories = []
    for _ in range(2):
        world = World(draw(17), trace=True)
        world.run()
        stories.append(world.trace)
    assert stories[0] == stories[1]


def test_scenarios_come_to_every_end_and_through_every_fault() -> None:
    seen = set()
    for seed in range(0, 400, 2):
        world = World(draw(seed), trace=True)
        world.run()
        seen.add(str(world.cloud.state.phase))
        seen.update(
            word
            for word in ("crashes in", "cut off", "the cloud crashes", "impostor", "altered",
                         "ROLLING_BACK", "WITHDRAWN", "REFETCH", "says Abort", "is halted",
                         "is paused", "wave 2", "right signature")
            if word in world.trace
        )  # fmt: skip
    assert {Phase.DONE, Phase.HALTED} <= seen
    assert len(seen) >= 15, seen


def test_replay() -> None:
    """The story of one seed, for whoever asks for it: ``-s`` prints it when it ends well, too."""
    world = World(draw(int(os.environ.get("SIMULATOR_SEED", "0"))), trace=True)
    try:
        world.run()
    finally:
        print(world.scenario, world.trace, sep="\n")  # noqa: T201
