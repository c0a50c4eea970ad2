"""What guidance, forced tokens and guesses save, with the real student and home commands.

Every command is answered in three ways: one pass a token; forced tokens in one pass; guesses, too.
The answers must be the same to the token, or this exits with 1. Time is of this machine and means
something only when nothing else runs; passes and computed tokens mean the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cloud.demo.commands import sample, skill_schema
from cloud.demo.homes import HOME_A
from edge.student.engine import Engine
from edge.student.guide import schema_grammar
from edge.student.runtime import Decoding, Student
from protos.prompt import Message, chat

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cloud.demo.commands import Command
    from edge.student.engine import Floats, KeyValues

_PLAIN = Decoding(max_tokens=40, top_logprobs=0, speculate=False)
MODES = {
    "one_pass_a_token": _PLAIN,
    "forced": replace(_PLAIN, top_logprobs=None),
    "forced_and_guessed": replace(_PLAIN, top_logprobs=None, speculate=True),
}


class CountingEngine(Engine):
    """Counts passes and the tokens in them."""

    passes = 0
    tokens = 0

    def forward(self, chat: KeyValues, ids: Sequence[int], wanted: Iterable[int]) -> Floats:
        """Count, and compute."""
        self.passes += 1
        self.tokens += len(ids)
        return super().forward(chat, ids, wanted)


@dataclass
class Measured:
    """What a mode cost."""

    answers: list[tuple[str, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    passes: int = 0
    computed: int = 0
    decoded: int = 0

    def figures(self) -> dict[str, float]:
        """Means for each request, and the median of its seconds."""
        count = len(self.answers)
        return {
            "request_median_s": round(statistics.median(self.seconds), 4),
            "passes": round(self.passes / count, 2),
            "computed_tokens": round(self.computed / count, 1),
            "answer_tokens": round(self.decoded / count, 1),
        }


def measure(bundle: Path, commands: Sequence[Command], decoding: Decoding) -> Measured:
    """Answer all commands with a student that is fresh but warm."""
    student = Student.open(bundle)
    engine = CountingEngine(student._engine.session, student.config)  # noqa: SLF001 - measured from inside
    student._engine = engine  # noqa: SLF001
    system = student.harness.system
    student.answer(chat(system, [Message("user", "hello")]), decoding)
    measured = Measured()
    engine.passes = engine.tokens = 0
    for command in commands:
        began = time.perf_counter()
        answer = student.answer(chat(system, [Message("user", command.text)]), decoding)
        measured.seconds.append(time.perf_counter() - began)
        measured.answers.append((answer.text, answer.finish_reason))
        measured.decoded += answer.completion_tokens
    measured.passes, measured.computed = engine.passes, engine.tokens
    student.close()
    return measured


def main() -> int:
    """Measure and write JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="folder of an imported student")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--skill", default="lights")
    parser.add_argument("--out", type=Path, default=Path("build/bench/decode.json"))
    options = parser.parse_args()
    commands = sample(options.skill, HOME_A, options.requests, random.Random(0))
    result: dict[str, object] = {"requests": len(commands)}
    different = 0
    for name, grammar in (
        ("guided", schema_grammar(skill_schema([options.skill]))),
        ("free", None),
    ):
        by_mode = {
            mode: measure(options.bundle, commands, replace(decoding, grammar=grammar))
            for mode, decoding in MODES.items()
        }
        plain = by_mode["one_pass_a_token"].answers
        wrong = sum(
            ours != theirs
            for measured in by_mode.values()
            for ours, theirs in zip(measured.answers, plain, strict=True)
        )
        different += wrong
        result[name] = {m: v.figures() for m, v in by_mode.items()} | {"different_answers": wrong}
        print(name, json.dumps(result[name], indent=1), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
