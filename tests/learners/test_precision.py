"""Which precision products have where, and that torch's own setting is put back."""

from __future__ import annotations

import pytest
import torch

from cloud.learners.precision import narrow, quick_products
from protos.errors import TrainingError

CPU = torch.device("cpu")


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
    seen = [torch.get_float32_matmul_precision()]

    def job(*, allowed: bool) -> None:
        with quick_products(allowed=allowed):
            seen.append(torch.get_float32_matmul_precision())
            raise TrainingError

    for allowed in (True, False):
        with pytest.raises(TrainingError):
            job(allowed=allowed)
        seen.append(torch.get_float32_matmul_precision())
    assert seen == ["highest", "medium", "highest", "highest", "highest"]
