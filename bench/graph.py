"""What the student's graph and session options are worth: prefill and decode, tokens a second.

One variable at a time against what ships: the block that shares a scale, how long worker threads
spin between two operators, how many rows a decoding pass has (two is what ships: it makes passes
exact, ``edge/student/engine.py``), graph optimisations. Variants take turns; medians and best of
the rounds are given. Results go to ``build/bench/graph.json``. Two minutes; other work beside it
makes the figures worthless.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import setup
from cloud.students import export, source
from edge.student.bundle import read_config
from edge.student.engine import KeyValues
from protos.harness import Harness

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPT, DECODED = 256, 64
_SPIN = "session.intra_op.spin_duration_us"


@dataclass(frozen=True)
class Variant:
    """What differs from what ships; ``spin_us`` None leaves ONNX Runtime's default, 0 is none."""

    block: int = 64
    spin_us: int | None = 100
    rows: int = 2
    entries: dict[str, str] = field(default_factory=dict)
    optimised: bool = True


VARIANTS = {
    "as it ships": Variant(),
    "blocks of 32": Variant(block=32),
    "no spinning": Variant(spin_us=0),
    "spinning by default": Variant(spin_us=None),
    "spinning 1000 us": Variant(spin_us=1000),
    "one row a pass": Variant(rows=1),
    "dynamic blocks of work": Variant(entries={"session.dynamic_block_base": "4"}),
    "graph as it is": Variant(optimised=False),
}


class Runner:
    """A session of one variant."""

    def __init__(self, bundle: Path, variant: Variant) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = setup.THREADS
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        spins = "0" if variant.spin_us == 0 else "1"
        options.add_session_config_entry("session.intra_op.allow_spinning", spins)
        if variant.spin_us:
            options.add_session_config_entry(_SPIN, str(variant.spin_us))
        for name, value in variant.entries.items():
            options.add_session_config_entry(name, value)
        if not variant.optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(
            str(bundle / "graph.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._config = read_config(bundle)
        self._rows = variant.rows

    def measure(self, number: int) -> tuple[float, float]:
        """Prefill and decode of a prompt of its own, tokens a second."""
        ids = [
            (i * 37 + number * 11) % (self._config["vocabulary"] - 400) + 300 for i in range(PROMPT)
        ]
        chat = KeyValues(self._session, self._config)
        chat.reserve(PROMPT + DECODED)
        start = time.perf_counter()
        ids.append(self._pass(chat, ids, PROMPT))
        middle = time.perf_counter()
        for _ in range(DECODED):
            ids.append(self._pass(chat, ids[-self._rows :], len(ids)))
        end = time.perf_counter()
        return PROMPT / (middle - start), DECODED / (end - middle)

    def _pass(self, chat: KeyValues, ids: Sequence[int], total: int) -> int:
        """The likeliest token after ``ids``, the last of ``total``."""
        binding, value = chat.binding, ort.OrtValue.ortvalue_from_numpy
        given: dict[str, Any] = {
            "input_ids": np.array([ids], dtype=np.int64),
            "seqlens_k": np.array([total - 1], dtype=np.int32),
            "total_length": np.array(total, dtype=np.int32),
            "rows": np.array([len(ids) - 1], dtype=np.int64),
        }
        for name, array in given.items():
            binding.bind_ortvalue_input(name, value(array))
        binding.bind_output("head.out", "cpu")
        self._session.run_with_iobinding(binding)
        return int(binding.get_outputs()[-1].numpy()[0].argmax())


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/graph.json"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    folder = options.out.parent / "graph"
    with Progress() as progress:
        bar = progress.add_task("export", total=1.0)
        blocks = sorted({v.block for v in VARIANTS.values()})
        if not all((folder / str(b)).exists() for b in blocks):
            brought = source.load(source.packaged_gguf())
            for block in blocks:
                export.export(brought, Harness(), folder / str(block), block=block)
        runners = {n: Runner(folder / str(v.block), v) for n, v in VARIANTS.items()}
        found: dict[str, list[tuple[float, float]]] = {n: [] for n in runners}
        for number in range(options.rounds):
            for name, runner in runners.items():
                progress.update(bar, description=name, completed=number / options.rounds)
                found[name].append(runner.measure(number))
        progress.update(bar, completed=1.0)
    variants = {}
    for name, pairs in found.items():
        prefill, decode = zip(*pairs, strict=True)
        variants[name] = {
            "prefill_tokens_per_s": round(statistics.median(prefill), 1),
            "decode_tokens_per_s": round(statistics.median(decode), 1),
            "best_prefill_tokens_per_s": round(max(prefill), 1),
            "best_decode_tokens_per_s": round(max(decode), 1),
        }
    note = {"date": time.strftime("%Y-%m-%d"), "machine": setup.machine(), "variants": variants}
    setup.write(options.out, note)
    table = Table("variant", "prefill/s", "decode/s", "best prefill/s", "best decode/s")
    for name, figures in variants.items():
        table.add_row(name, *(f"{v:.0f}" for v in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
