"""Which precision products have where, and that torch's own setting is put back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import cosine_similarity

from cloud.learners.config import LearnerConfig
from cloud.learners.precision import fp32_products, narrow
from cloud.learners.targets import score
from protos.errors import TrainingError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from tests.learners.learner_course import CPU, EXAMPLES, load, long, run, small, split
else:
    from learner_course import CPU, EXAMPLES, load, long, run, small, split


def setting() -> str:
    of_torch: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return of_torch


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({}, False),
        ({"avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(
    able: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert narrow("auto", CPU) is expected
    assert narrow("bf16", CPU) is True
    assert narrow("fp32", CPU) is False


def test_torchs_setting_is_put_back_after_a_job_that_failed() -> None:
    before = setting()

    def job() -> None:
        with fp32_products("bf16"):
            assert setting() == "bf16"
            with fp32_products("ieee"):
                assert setting() == "ieee"
            assert setting() == "bf16"
            raise TrainingError

    with pytest.raises(TrainingError):
        job()
    assert setting() == before


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "ieee"), ("bf16", "bf16")])
def test_a_job_says_its_precision_and_rounds_no_angle(
    precision: str, expected: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotary = type(load(tiny_folder).model.rotary_emb)
    steps: set[str] = set()
    angles: set[str] = set()
    forward = rotary.forward

    def watched(*given: Any) -> Any:  # noqa: ANN401
        angles.add(setting())
        return forward(*given)

    monkeypatch.setattr(rotary, "forward", watched)
    config = small("sdft", steps=2, precision=precision)
    samples = replace(config, rollouts="on-policy", hint=(0.0, 0.0))
    for learner in (config, samples):
        outcome = run(tiny_folder, learner, report=lambda _: steps.add(setting()))
        assert outcome.precision == precision
    assert (steps, angles) == ({expected}, {"ieee"})


def test_bf16_moves_log_probabilities_a_little_and_keeps_them_in_fp32(tiny_folder: Path) -> None:
    fine, coarse = (
        split(tiny_folder, LearnerConfig(precision=precision)) for precision in ("fp32", "bf16")
    )
    expected, found = (model.log_probs(model.upper, EXAMPLES) for model in (fine, coarse))
    assert found.dtype == torch.float32
    assert all(hidden.dtype == torch.float32 for hidden in coarse.made_of(EXAMPLES))
    moved = float((found - expected).abs().mean())
    assert 1e-3 < moved < 0.03, moved


@pytest.mark.parametrize(
    "changes",
    [{}, {"layers": (0.0, 1.0)}, {"layers": (0.0, 1.0), "embeddings": True}, {"rank": 2}],
    ids=["upper half", "all layers", "embeddings", "adapters"],
)
def test_gradients_of_bf16_are_fp32_and_point_where_those_of_fp32_do(
    changes: dict[str, Any], tiny_folder: Path
) -> None:
    def gradients(precision: str) -> list[torch.Tensor]:
        config = LearnerConfig(**({"precision": precision} | changes))
        model = split(tiny_folder, config)
        if config.rank:
            model.add_adapters(config.rank, config.alpha, seed=0)
        parameters = model.trainable().values()
        for p in parameters:
            p.requires_grad_()
        # What was scored before, without gradients, leaves no cast of a weight behind.
        list(score(model, model.upper, EXAMPLES, tokens=99))
        log_probs = model.log_probs(model.upper, [*EXAMPLES, long(200)])
        torch.autograd.backward(-log_probs[:, 20].sum())
        return [p.grad for p in parameters if p.grad is not None]

    fine, coarse = gradients("fp32"), gradients("bf16")
    for one, other in zip(fine, coarse, strict=True):
        assert other.dtype == torch.float32
        if one.any():  # what goes into an adapter has no gradient while what comes out is zero
            assert cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99
