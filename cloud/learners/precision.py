"""In which precision a learner multiplies matrices; its weights and sums are fp32 always.

Of bfloat16 (Kalamkar et al., arXiv 1905.12322) products alone are made: weights are rounded for
them, and stay as they are in memory, in the optimizer and in checkpoints.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cloud.learners.config import Precision

_ABLE = ("avx512_bf16", "amx_bf16")


def narrow(precision: Precision, device: torch.device) -> bool:
    """Whether products are in bfloat16.

    ``auto`` is yes on a processor that multiplies it by itself (x86 with AVX512-BF16 or AMX): one
    that does not is slower with it than with fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    able = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(able.get(name, False) for name in _ABLE)


@contextmanager
def fp32_products(how: Literal["ieee", "bf16"]) -> Iterator[None]:
    """How torch multiplies fp32 tensors on a processor, until the context ends.

    With ``bf16`` oneDNN does it, which may round factors where the processor gains by it (sums and
    results stay fp32); ``ieee`` rounds nothing. The setting is torch's own, of the whole process.
    """
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch gives no types
    before = setting.fp32_precision
    setting.fp32_precision = how
    try:
        yield
    finally:
        setting.fp32_precision = before
