"""How fast a student answers: ours beside llama.cpp's server and onnxruntime-genai.

The same weights for all: the packaged student after it has learnt a skill of home commands; 8 bits
each (ours and genai from the very same file, llama.cpp as Q8_0 from the fp32 weights). Two threads
each, one request at a time, prompt caches on, the skill's JSON schema as grammar. Engines take
turns within every measurement, so that a disturbance meets all of them:

- requests: unseen home commands over HTTP, from sending to the whole tool call; how many are valid
  and how many right to the letter is counted too;
- first token: the same commands, streamed, until the first piece of text arrives;
- prefill and decode, plain: a prompt of some 256 tokens, then 128 tokens of free text, without
  grammar or speculation. llama.cpp reports these itself; genai's are taken around its generator,
  ours around its session, so that HTTP counts for none.

Results go to ``build/bench/student.json``; ``--engines`` measures some anew and keeps the others'
figures. Ten minutes, of which learning the skill (once, kept) is half.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from bench import engines, genai_folder, gguf_q8, setup, skills
from cloud.demo.commands import skill_schema
from cloud.learners.config import LearnerConfig
from cloud.students import source
from cloud.students.export import write_back
from edge.student.bundle import digest, read_config, read_harness
from edge.student.engine import Engine, open_session
from protos.errors import AnabranchError
from protos.harness import Harness
from protos.prompt import Message, Shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAMES = ("anabranch", "llama.cpp", "onnxruntime-genai")
SKILL, TRAIN, LIMIT, THREADS = "lights", 120, 64, 2
TURN = 20  # requests to an engine before the next one has its turn
PROMPT, DECODED, ROUNDS = 256, 128, 5
_WORDS = (
    "lamp",
    "door",
    "garden",
    "window",
    "river",
    "stone",
    "yellow",
    "winter",
    "morning",
    "paper",
)


@dataclass
class Seen:
    """What was measured of one engine."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    valid: int = 0
    right: int = 0


def learnt(folder: Path, tell: Callable[[str, float], None]) -> tuple[Path, Path]:
    """The student that has learnt the skill: bundle and GGUF file, made once."""
    schema = skill_schema([SKILL])
    harness = Harness(system=skills.SYSTEM, schema=schema, guided=True, max_tokens=LIMIT)
    imported = setup.student(harness, folder / "import", tell)
    weights, bundle, gguf = folder / "learnt.safetensors", folder / "bundle", folder / "q8_0.gguf"
    if not weights.exists():
        taught = skills.material(SKILL, 0, train=TRAIN, tests=1)
        job = setup.spec(imported, taught, LearnerConfig())
        state, _ = setup.train(job, lambda part: tell("learn the skill", part))
        save_file(state, weights.with_suffix(".tmp"))
        weights.with_suffix(".tmp").replace(weights)
    state = load_file(weights)
    write_back(imported.bundle, state, harness, bundle)
    if not gguf.exists() or gguf.stat().st_mtime < weights.stat().st_mtime:
        tell("write Q8_0", 0.0)
        masters = load_file(imported.masters / "model.safetensors")
        gguf_q8.write(source.packaged_gguf(), masters | state, gguf)
    return bundle, gguf


def commands(count: int, folder: Path) -> list[Shown]:
    """Unseen commands, drawn once: none that was learnt."""
    file = folder / f"commands-{count}.json"
    if not file.exists():
        taught = skills.material(SKILL, 0, train=TRAIN, tests=1).train
        learnt_texts = [s.messages[-1].content for s in taught]
        asked = skills.material(SKILL, 1, train=1, tests=count, exclude=learnt_texts).tests
        rows = [(s.messages[-1].content, s.answer) for s in asked]
        file.write_text(json.dumps(rows, indent=1) + "\n")
    rows = json.loads(file.read_text())
    return [Shown((Message("user", text),), answer) for text, answer in rows]


class Plain:
    """Our engine in this process, without grammar or speculation."""

    def __init__(self, bundle: Path) -> None:
        session = open_session(bundle, threads=THREADS)
        self._engine = Engine(session, read_config(bundle))
        self._tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))

    def measure(self, text: str) -> tuple[float, float]:
        """Prefill and decode, tokens a second."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        chat = self._engine.open_chat()
        chat.reserve(len(ids) + DECODED)
        start = time.perf_counter()
        token = int(self._engine.forward(chat, ids, [len(ids) - 1])[0].argmax())
        middle = time.perf_counter()
        for _ in range(DECODED - 1):
            token = int(self._engine.forward(chat, [token], [0])[0].argmax())
        end = time.perf_counter()
        return len(ids) / (middle - start), (DECODED - 1) / (end - middle)


def prompt(number: int) -> str:
    """Some 256 tokens that no earlier prompt begins with."""
    words = [_WORDS[(number * 7 + i * (number + 3)) % len(_WORDS)] for i in range(PROMPT - 30)]
    return f"{number} {' '.join(words)}"


def measure_requests(
    client: engines.Client, asked: Sequence[Shown], seen: Seen, harness: Harness
) -> None:
    """A turn of requests."""
    for shown in asked:
        start = time.perf_counter()
        answer, usage = client.ask(shown.messages[-1].content, LIMIT)
        seen.seconds.append(time.perf_counter() - start)
        seen.tokens.append(usage["completion_tokens"])
        seen.valid += not harness.breaks_schema(answer)
        seen.right += answer == shown.answer


def measure_plain(client: engines.Client, ours: Plain, number: int, seen: Seen) -> None:
    """One round of prefill and decode."""
    if client.engine.name == "anabranch":
        prefill, decode = ours.measure(prompt(number))
    else:
        usage = client.plain(prompt(number), DECODED)
        prefill = 1000 * usage["prompt_n"] / usage["prompt_ms"]
        decode = usage["predicted_per_second"]
    seen.prefill.append(prefill)
    seen.decode.append(decode)


def report(seen: Seen, client: engines.Client) -> dict[str, Any]:
    """An engine's figures."""
    cuts = statistics.quantiles(seen.seconds, n=100, method="inclusive")
    return {
        "request_median_s": round(statistics.median(seen.seconds), 4),
        "request_p95_s": round(cuts[94], 4),
        "request_p99_s": round(cuts[98], 4),
        "first_token_s": round(statistics.median(seen.first), 4),
        "decode_tokens_per_s": round(statistics.median(seen.decode), 1),
        "prefill_tokens_per_s": round(statistics.median(seen.prefill), 1),
        "rss_mb": client.engine.peak_mb(),
        "guided": client.guided,
        "valid": round(seen.valid / len(seen.seconds), 3),
        "exact": round(seen.right / len(seen.seconds), 3),
        "answer_tokens": round(statistics.mean(seen.tokens), 1),
        "requests": len(seen.seconds),
        "measured": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def measure(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """All engines, in turns."""
    folder = options.out.parent / "student"
    folder.mkdir(parents=True, exist_ok=True)
    bar = progress.add_task("student", total=1.0)

    def tell(what: str, part: float) -> None:
        progress.update(bar, description=what, completed=part)

    bundle, gguf = learnt(folder, tell)
    tell("draw unseen commands", 0.0)
    asked = commands(options.requests, folder)
    ours, harness = Plain(bundle), read_harness(bundle)
    seen = {name: Seen() for name in options.engines}
    with ExitStack() as stack:
        clients = []
        for name in options.engines:
            tell(f"start {name}", 0.0)
            engine = stack.enter_context(_start(name, bundle, gguf, folder))
            clients.append(engines.Client(engine, harness.system, skill_schema([SKILL])))
        for client in clients:
            measure_requests(client, asked[:3], Seen(), harness)  # warm up
        steps = 2 * len(asked) // TURN + ROUNDS
        for done in range(ROUNDS):
            tell("prefill and decode", done / steps)
            for client in clients:
                measure_plain(client, ours, done, seen[client.engine.name])
        for number, start in enumerate(range(0, len(asked), TURN)):
            turn = asked[start : start + TURN]
            for client in clients:
                tell(f"requests: {client.engine.name}", (ROUNDS + 2 * number) / steps)
                measure_requests(client, turn, seen[client.engine.name], harness)
            for client in clients:
                tell(f"first token: {client.engine.name}", (ROUNDS + 2 * number + 1) / steps)
                for shown in turn[::4]:
                    text = shown.messages[-1].content
                    seen[client.engine.name].first.append(client.first_token_s(text, LIMIT))
        tell("done", 1.0)
        figures = {c.engine.name: report(seen[c.engine.name], c) for c in clients}
    return _written(options.out, figures, digest(bundle))


def _start(name: str, bundle: Path, gguf: Path, folder: Path) -> Any:  # noqa: ANN401
    """An engine's process as a context."""
    if name == "anabranch":
        return engines.agent(bundle, folder / "agent", threads=THREADS)
    if name == "llama.cpp":
        return engines.peer(name, "llama_server.py", gguf, folder, "--threads", str(THREADS))
    genai_folder.make(bundle, folder / "genai")
    return engines.peer(name, "genai_server.py", folder / "genai", folder)


def _written(out: Path, figures: dict[str, Any], student: str) -> dict[str, Any]:
    earlier = json.loads(out.read_text())["engines"] if out.exists() else {}
    merged = {n: f for n, f in {**earlier, **figures}.items() if n in NAMES}
    ours = merged.get("anabranch")
    ratios = {}
    for name, other in merged.items():
        if ours and name != "anabranch":
            ratios[name] = {
                "decode": round(ours["decode_tokens_per_s"] / other["decode_tokens_per_s"], 2),
                "prefill": round(ours["prefill_tokens_per_s"] / other["prefill_tokens_per_s"], 2),
                "request": round(ours["request_median_s"] / other["request_median_s"], 2),
            }
    note = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": setup.machine(),
        "threads": THREADS,
        "skill": SKILL,
        "student": student,
        "versions": {"anabranch": version("anabranch"), "onnxruntime": version("onnxruntime")},
        "engines": merged,
        "ratios": ratios,
    }
    setup.write(out, note)
    return note


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/student.json"))
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--prepare", action="store_true", help="make the files, measure nothing")
    parser.add_argument("--requests", type=int, default=200, help="commands asked of each engine")
    options = parser.parse_args()
    try:
        if options.prepare:
            folder = options.out.parent / "student"
            learnt(folder, lambda *_: None)
            commands(options.requests, folder)
            return
        engines.end_in_good_order()
        with Progress() as progress:
            note = measure(options, progress)
    except AnabranchError as error:
        sys.exit(f"error: {error}")
    table = Table("engine", "request", "p95", "first token", "decode/s", "prefill/s", "MB", "exact")
    for name, f in note["engines"].items():
        table.add_row(
            name,
            *(f"{f[k]:.3f}" for k in ("request_median_s", "request_p95_s", "first_token_s")),
            *(f"{f[k]:.0f}" for k in ("decode_tokens_per_s", "prefill_tokens_per_s", "rss_mb")),
            f"{f['exact']:.2f}",
        )
    Console().print(table, note["ratios"])


if __name__ == "__main__":
    main()
