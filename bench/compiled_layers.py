"""What ``torch.compile`` does for a step: ``python -m bench.compiled_layers eager|compiled sft``.

Twenty steps of a method of ``bench.learner_speed``, with the parts of a layer before and after its
attention compiled or not. It needs a C++ compiler, and the student that that benchmark imports.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import learner_speed
from cloud.learners import model

if TYPE_CHECKING:
    from collections.abc import Sequence


def _before(layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    own = layer.self_attn
    normed = layer.input_layernorm(hidden)
    query, key, value = (
        project(normed).unflatten(1, (-1, own.head_dim))
        for project in (own.q_proj, own.k_proj, own.v_proj)
    )
    return model._rotate(query, cos, sin), model._rotate(key, cos, sin), value


def _after(layer: Any, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    hidden = hidden + layer.self_attn.o_proj(seen)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def compile_layers() -> None:
    """Put compiled parts in the place of the learner's layer."""
    torch._dynamo.config.cache_size_limit = 64
    before, after = (torch.compile(part, dynamic=True) for part in (_before, _after))

    def layer(
        layer: Any,
        hidden: torch.Tensor,
        places: Sequence[Any],
        rotary: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        query, key, value = before(layer, hidden, *rotary)
        seen = model.attend(query, key, value, places, layer.self_attn.scaling)
        if rows is not None:
            hidden, seen = hidden[rows], seen[rows]
        return after(layer, hidden, seen)

    model._layer = layer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("how", choices=("eager", "compiled"))
    parser.add_argument("method", choices=learner_speed.OURS)
    parser.add_argument("--student", type=Path, default=Path("build/bench/learner-student"))
    options = parser.parse_args()
    if options.how == "compiled":
        compile_layers()
    began = time.monotonic()
    found = learner_speed.ours(options.method, options.student)
    figures = {k: found[k] for k in ("step_alone_seconds", "scoring_seconds", "peak_mb")}
    print(options.how, options.method, figures, round(time.monotonic() - began, 1))


if __name__ == "__main__":
    main()
