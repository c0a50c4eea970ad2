"""What a student still knows of the world: ARC-easy, PIQA, COPA and LAMBADA, by log-likelihood.

Run ``python bench/retention.py BUNDLE``, where BUNDLE is the ``bundle`` folder of an imported
student (``build/demo/student/bundle`` after ``make demo``) or any candidate that the cloud made.
It scores the very file that devices run, through their own runtime, in about two minutes on two
cores, prints a table and, with ``--out FILE``, writes JSON.

The texts are the prompts of EleutherAI's lm-evaluation-harness without examples and without a chat
template. A choice's tokens are those of the whole text less those of the query.

- acc: share of questions whose right choice has the highest sum of log-likelihoods;
- acc_norm: the same, each sum divided by the choice's length in bytes;
- LAMBADA's acc: share of passages whose whole last word is the greedy continuation.

The headline of a task, which the mean is of, is what is usually reported of it: acc_norm of ARC
and PIQA, acc of COPA and LAMBADA. Each task is its first 300 rows after a seeded shuffle (COPA has
100 in all), so two students see the same rows and may be compared in pairs (``correct``). With 300
rows a share has a standard error of about 2.8 points; compare pairs rather than shares.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from edge.student.prefix import shared
from edge.student.runtime import Student
from protos.errors import AnabranchError, ContextLengthError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from edge.student.engine import KeyValues

ROWS, SEED = 300, 0
DATA = Path("../shared/data")
TASKS = {
    "arc_easy": "arc_easy",
    "piqa": "piqa",
    "copa": "copa",
    "lambada": "lambada_openai",
}
"""Each task, and its file's name without ``.jsonl``."""

HEADLINE = ("arc_easy/acc_norm", "piqa/acc_norm", "copa/acc", "lambada/acc")
"""The metrics that ``mean`` is of."""


@dataclass(frozen=True)
class Question:
    """A query and its possible continuations, each with the space before it; ``gold`` is an index.

    With a single continuation the question is whether it is the greedy one.
    """

    query: str
    choices: tuple[str, ...]
    gold: int


class Scorer(Student):
    """A student that scores texts; choices of a question share the work on their query."""

    _scored: KeyValues | None = None

    def twin(self) -> Self:
        """A second one on the same weights, for another thread; close it too."""
        return type(self)(self.folder, self._engine.session, self.tokenizer)

    def answers(self, asked: Question) -> list[tuple[float, bool]]:
        """For each choice its log-likelihood in nats, and whether it is the greedy continuation.

        Raises:
            InvalidInputError: the query or a choice has no token of its own.
            ContextLengthError: a query with a choice is longer than the student's context.
            IntegrityError: the student is closed.
        """
        self._scored = None  # the questions before have nothing in common with this one
        return [self._continuation(asked.query, choice) for choice in asked.choices]

    def _continuation(self, query: str, text: str) -> tuple[float, bool]:
        start = len(self.tokenizer.encode(query, add_special_tokens=False).ids)
        whole = self.tokenizer.encode(query + text, add_special_tokens=False).ids
        if not 0 < start < len(whole):
            msg = f"query {query!r} and continuation {text!r} need a token each: give both a text"
            raise InvalidInputError(msg)
        if len(whole) > self.context_length:
            msg = f"a text of {len(whole)} tokens does not fit a context of {self.context_length}"
            raise ContextLengthError(msg)
        logits, wanted = self._logits_from(whole[:-1], start - 1), np.array(whole[start:])
        peak = logits.max(axis=1)
        norm = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
        said = logits[np.arange(len(wanted)), wanted]
        return float((said - norm).sum()), bool((logits.argmax(axis=1) == wanted).all())

    def _logits_from(self, ids: list[int], first: int) -> npt.NDArray[np.float32]:
        """Teacher-forced logits [len(ids) - first, vocabulary] at ``first`` and after."""
        chat, self._scored = self._scored or self._engine.open_chat(), None
        chat.truncate(shared(chat.ids, ids[:first]))
        known = len(chat.ids)
        logits = self._engine.forward(chat, ids[known:], range(first - known, len(ids) - known))
        self._scored = chat  # not after an exception: what the chat holds is not certain then
        return logits


def question(task: str, raw: Mapping[str, Any]) -> Question:
    """A row of a task's file with the wording of lm-evaluation-harness.

    Raises:
        InvalidInputError: no such task.
    """
    if task == "lambada":
        return Question(raw["context"], (f" {raw['continuation']}",), 0)
    if task not in TASKS:
        msg = f"there is no task {task!r}: choose from {', '.join(TASKS)}"
        raise InvalidInputError(msg)
    query = raw["query"].rstrip()
    query = query if task == "copa" else f"{query}\nAnswer:"
    return Question(query, tuple(f" {choice}" for choice in raw["choices"]), int(raw["gold"]))


def questions(data: Path, task: str, rows: int = ROWS) -> list[Question]:
    """The first ``rows`` questions of a task after a seeded shuffle, or all if there are fewer.

    Raises:
        InvalidInputError: ``data`` does not hold the task's file.
    """
    path = data / "retention" / f"{TASKS[task]}.jsonl"
    if not path.is_file():
        msg = (
            f"{path} is not there: the benchmark's data is no part of the repository; put the "
            f"JSONL files of ARC-easy, PIQA, COPA and LAMBADA into {path.parent}, or name the "
            "folder that has retention/ in it with --data"
        )
        raise InvalidInputError(msg)
    lines = path.read_text(encoding="utf-8").splitlines()
    random.Random(SEED).shuffle(lines)
    return [question(task, json.loads(line)) for line in lines[:rows]]


def judge(task: str, asked: Question, scores: Sequence[tuple[float, bool]]) -> dict[str, bool]:
    """Whether a row is right, by the task's metrics (of equal choices the first is the answer).

    ``scores`` are, for each choice, log-likelihood in nats and whether it is the greedy one.
    """
    if task == "lambada":
        return {"acc": scores[0][1]}
    sums = [score for score, _ in scores]
    sizes = [len(choice.strip().encode()) for choice in asked.choices]
    by_byte = [total / max(size, 1) for total, size in zip(sums, sizes, strict=True)]
    return {
        "acc": int(np.argmax(sums)) == asked.gold,
        "acc_norm": int(np.argmax(by_byte)) == asked.gold,
    }


def correct(
    bundle: Path,
    data: Path,
    *,
    rows: int = ROWS,
    threads: int = 2,
    report: Callable[[str, float], None] = lambda *_: None,
) -> dict[str, list[bool]]:
    """Whether each row is right, by metric (``arc_easy/acc``, ``arc_easy/acc_norm``, ...).

    Row ``i`` of a metric is the same question for every student, so lists can be compared in pairs.
    ``data`` is the folder that has ``retention/`` in it; ``report`` gets a task's name and the
    share of all work that is done (0..1).

    Raises:
        InvalidInputError: the data is absent.
        IntegrityError: the bundle is broken.
    """
    todo = [(task, asked) for task in TASKS for asked in questions(data, task, rows)]
    right: dict[str, list[bool]] = {}
    scorers = [Scorer.open(bundle, threads=1)]
    pool = ThreadPoolExecutor(threads)
    try:
        scorers += [scorers[0].twin() for _ in range(threads - 1)]
        idle = SimpleQueue[Scorer]()
        for scorer in scorers:
            idle.put(scorer)

        def ask(item: tuple[str, Question]) -> list[tuple[float, bool]]:
            scorer = idle.get()
            try:
                return scorer.answers(item[1])
            finally:
                idle.put(scorer)

        for done, ((task, asked), scores) in enumerate(zip(todo, pool.map(ask, todo), strict=True)):
            report(task, done / len(todo))
            for metric, row in judge(task, asked, scores).items():
                right.setdefault(f"{task}/{metric}", []).append(row)
    finally:
        pool.shutdown(cancel_futures=True)
        for scorer in scorers:
            scorer.close()
    report("done", 1.0)
    return right


def shares(right: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    """Accuracies (0..1) of what ``correct`` returned, and ``mean``, that of ``HEADLINE``."""
    found = {metric: sum(rows) / len(rows) for metric, rows in right.items()}
    return {**found, "mean": sum(found[metric] for metric in HEADLINE) / len(HEADLINE)}


def retention(
    bundle: Path,
    data: Path,
    *,
    rows: int = ROWS,
    threads: int = 2,
    report: Callable[[str, float], None] = lambda *_: None,
) -> dict[str, float]:
    """Accuracies (0..1) of a bundle by metric, and ``mean``, that of ``HEADLINE``.

    Arguments and errors are those of ``correct``.
    """
    return shares(correct(bundle, data, rows=rows, threads=threads, report=report))


def main() -> None:
    """Score a bundle and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="student bundle, or the imported student with it")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="has retention/ (default: %(default)s)"
    )
    parser.add_argument(
        "--rows", type=int, default=ROWS, help="of each task (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.rows < 1 or options.threads < 1:
        parser.error("--rows and --threads are 1 or more")
    inner = options.bundle / "bundle"
    bundle, began = inner if inner.is_dir() else options.bundle, time.monotonic()
    try:
        with Progress() as progress:
            bar = progress.add_task("open", total=1.0)
            right = correct(
                bundle,
                options.data,
                rows=options.rows,
                threads=options.threads,
                report=lambda task, part: progress.update(bar, description=task, completed=part),
            )
    except AnabranchError as error:
        sys.exit(f"error: {error}")
    found, seconds = shares(right), round(time.monotonic() - began, 1)
    table = Table("metric", "rows", "share", title=f"{seconds} s; * counts in the mean")
    for metric, share in found.items():
        rows = str(len(right[metric])) if metric in right else ""
        table.add_row(metric + " *" * (metric in HEADLINE), rows, f"{share:.3f}")
    Console().print(table)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        note = {"bundle": str(bundle), "seconds": seconds, "shares": found}
        options.out.write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()
