"""The options of commands that learn, as people type them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cloud.learners.config import LearnerConfig, read_options

Learner = Annotated[
    str, typer.Option(help="How to learn: sft-anchored, sdft, ... (docs/learning.md).")
]
Steps = Annotated[int, typer.Option(min=1, help="Training steps of an adaptation.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Higher: more in fewer steps, farther from the base.")
]
Budget = Annotated[
    float, typer.Option(min=0, help="Seconds that learning may take; 0: all its steps.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="OPTION=VALUE",
        help="Another option of the learner, such as rank=8 or fallback=stop; may be repeated.",
    ),
]
Precision = Annotated[
    str, typer.Option(help="Of products: fp32, bf16, or auto: bf16 where the processor has it.")
]
MinNew = Annotated[
    float, typer.Option(min=0, max=1, help="Share of held-out corrections to answer exactly.")
]
MaxBaseKl = Annotated[
    float, typer.Option(min=0, help="Bound on KL(base || candidate), nats a token.")
]
DeltaShare = Annotated[
    float,
    typer.Option(min=0, max=1, help="Most that an update by products takes; 0: always all codes."),
]
Threads = Annotated[int, typer.Option(min=1, help="Threads to compute with.")]


def learner_of(
    name: str,
    steps: int | None,
    learning_rate: float | None,
    budget: float,
    precision: str,
    options: list[str] | None,
) -> LearnerConfig:
    """A learner by name, with options; those of ``--set`` go before the others, None is its own.

    Raises:
        InvalidInputError: no learner has that name, or an option is wrong.
    """
    changes: dict[str, Any] = {"budget_seconds": budget, "precision": precision}
    changes |= {} if steps is None else {"steps": steps}
    changes |= {} if learning_rate is None else {"learning_rate": learning_rate}
    return LearnerConfig.named(name, **(changes | read_options(options or ())))
