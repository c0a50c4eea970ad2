"""TRL's ``SDFTTrainer`` as a peer, run in its own environment (``bench/peers/trl_sdft.py``)."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protos.errors import AnabranchError, UnavailableError
from protos.prompt import chat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.prompt import Shown

PYTHON = Path("build/bench/trl-venv/bin/python")
_SCRIPT = Path(__file__).parent / "peers" / "trl_sdft.py"


@dataclass(frozen=True)
class Run:
    """What the peer learns from and with.

    ``model`` is a Hugging Face folder in fp32, ``tokenizer`` a ``tokenizer.json``; ``teacher`` is
    the paper's prompt, or ``given``: the demonstration as two turns of the chat, as ours sees it.
    With ``bf16`` it computes in mixed precision, weights in fp32.
    """

    model: Path
    tokenizer: Path
    system: str
    steps: int
    batch: int
    cap: int
    seed: int = 0
    teacher: str = "paper"
    threads: int = 2
    bf16: bool = False


def learn(
    run: Run, train: Sequence[Shown], folder: Path, *, save: Path | None = None
) -> dict[str, Any]:
    """Run it; what its script writes. ``folder`` takes its input and output.

    Raises:
        UnavailableError: its environment is missing.
        AnabranchError: it failed.
    """
    if not PYTHON.exists():
        msg = f"{PYTHON} is missing: `make bench-learner-speed` makes TRL's environment"
        raise UnavailableError(msg)
    rows = []
    for shown in train:
        asked, taught = (
            chat(run.system, shown.messages),
            chat(run.system, shown.messages, [shown] * 2),
        )
        rows.append(
            json.dumps(
                {
                    "prompt": [asdict(m) for m in asked],
                    "answer": shown.answer,
                    "teacher_prompt": [asdict(m) for m in taught],
                }
            )
        )
    data, result = folder / "trl.jsonl", folder / "trl.json"
    data.write_text("\n".join(rows) + "\n")
    given = {
        "--model": run.model,
        "--tokenizer": run.tokenizer,
        "--data": data,
        "--out": result,
        "--steps": run.steps,
        "--batch": run.batch,
        "--max-completion": run.cap,
        "--seed": run.seed,
        "--teacher": run.teacher,
        "--threads": run.threads,
    }
    words = [str(word) for pair in given.items() for word in pair]
    words += ["--save", str(save)] if save else []
    words += ["--bf16"] if run.bf16 else []
    ended = subprocess.run(
        [str(PYTHON), str(_SCRIPT), *words], capture_output=True, text=True, check=False
    )
    if ended.returncode:
        msg = f"TRL ended with {ended.returncode}: {ended.stderr[-2000:]}"
        raise AnabranchError(msg)
    note: dict[str, Any] = json.loads(result.read_text())
    return note
