"""Which options each method of ``bench.learner`` has: ours, ours with one thing changed, rivals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cloud.learners.config import PRESETS, LearnerConfig
from protos.errors import AnabranchError

QUICK = ("sdft", "sft_anchored", "sft")
FULL = (
    *QUICK,
    "sdft_no_anchor",
    "sdft_no_replay",
    "sdft_teacher_only",
    "isdft",
    "sft_replay",
    "lora",
    "ewc",
    "full_sft",
    "trl",
)
ABLATIONS: dict[str, dict[str, Any]] = {
    "sdft": {},
    "sdft_no_anchor": {"anchor_batch": 0},
    "sdft_no_replay": {"replay_batch": 0},
    "sdft_teacher_only": {"hint": (0.0, 0.0), "sharpness": 1.0},
    "isdft": {"hint": (0.0, 0.0), "sharpness": 1.0, "proximal": 0.25, "base_weight": 2e-3},
}
"""Our learner as it is, without one thing, without what leads the teacher's word, and as iSDFT."""
_ALONE: dict[str, Any] = {"anchor_batch": 0, "replay_batch": 0}
RIVALS: dict[str, dict[str, Any]] = {
    "sft": _ALONE,
    "sft_replay": {"anchor_batch": 0},
    "lora": {**_ALONE, "rank": 16, "learning_rate": 5e-4},
    "ewc": {**_ALONE, "ewc": PRESETS["ewc"]["ewc"]},
    "full_sft": {**_ALONE, "layers": (0.0, 1.0), "embeddings": True, "learning_rate": 2e-5},
}
"""Cross-entropy with our options, but for these."""
ANY_STEPS = 100_000  # a budget in seconds ends the job before


def config_of(
    method: str, seed: int, ours: float | None, base: LearnerConfig, rival_steps: int = 0
) -> LearnerConfig:
    """Options of a method; ``ours`` are the seconds that our learner took, ``base`` its options."""
    if method in ABLATIONS:
        return replace(base, seed=seed, **ABLATIONS[method])
    if method == "sft_anchored" and rival_steps:
        return replace(base, method="sft", seed=seed, steps=rival_steps)
    if method == "sft_anchored":
        if ours is None:
            msg = "sft_anchored has the time that sdft took: measure sdft too, before it"
            raise AnabranchError(msg)
        return replace(base, method="sft", seed=seed, steps=ANY_STEPS, budget_seconds=ours)
    return replace(base, method="sft", seed=seed, **RIVALS[method])
