"""Log-likelihoods by the devices' runtime agree with plain teacher forcing, whatever is shared."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from bench.retention import HEADLINE, Question, Scorer, correct, judge, question, questions, shares
from protos.errors import ContextLengthError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge.student.runtime import Student

CHOICE = {"query": "Question: what?\n", "choices": ["one thing", "one", "two things"], "gold": 1}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "retention"
    folder.mkdir()
    for name in ("arc_easy", "piqa", "copa"):
        lines = [{**CHOICE, "query": f"Question: {name} {i}?"} for i in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    passages = [{"context": f"It was {i} and", "continuation": "so"} for i in range(6)]
    text = "".join(json.dumps(x) + "\n" for x in passages)
    (folder / "lambada_openai.jsonl").write_text(text)
    return tmp_path


@pytest.fixture
def scorer(tiny_student: Path) -> Iterator[Scorer]:
    opened = Scorer.open(tiny_student / "bundle", threads=1)
    yield opened
    opened.close()


def forced(student: Student, query: str, text: str) -> tuple[float, bool]:
    """The same by one pass over the whole text, in float64."""
    start = len(student.tokenizer.encode(query).ids)
    ids = student.tokenizer.encode(query + text).ids
    logits = student.logits(ids[:-1], start - 1).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = ids[start:]
    greedy = logits.argmax(axis=1).tolist() == wanted
    return float(sum(logp[i, token] for i, token in enumerate(wanted))), greedy


def test_sharing_the_query_changes_no_score(scorer: Scorer) -> None:
    asked = Question("Question: what?\nAnswer:", (" one thing", " one", " x", " two" * 90), 0)
    for _ in range(2):
        found = scorer.answers(asked)
        for (score, greedy), choice in zip(found, asked.choices, strict=True):
            wanted = forced(scorer, asked.query, choice)
            assert score == pytest.approx(wanted[0], abs=1e-3)
            assert greedy == wanted[1]


def test_the_greedy_continuation_is_known_as_such(scorer: Scorer) -> None:
    def greedy(query: str) -> str:
        ids = scorer.tokenizer.encode(query).ids
        return str(scorer.tokenizer.decode([int(scorer.logits(ids, len(ids) - 1)[0].argmax())]))

    # The tiny model's best byte is not always one that stands for itself as text.
    pairs = ((query, greedy(query)) for query in (f"It was {i}" for i in range(100)))
    query, best = next((q, text) for q, text in pairs if len(text) == 1 and text.isascii())
    other = "a" if best != "a" else "b"
    found = scorer.answers(Question(query, (best, other), 0))
    assert [whether for _, whether in found] == [True, False]


def test_what_does_not_fit_the_context_or_has_no_token_is_refused(scorer: Scorer) -> None:
    with pytest.raises(ContextLengthError, match="does not fit a context"):
        scorer.answers(Question("a" * scorer.context_length, (" b",), 0))
    for query, choice in (("", " b"), ("a", "")):
        with pytest.raises(InvalidInputError, match="need a token each"):
            scorer.answers(Question(query, (choice,), 0))


def test_prompts_are_those_of_lm_evaluation_harness() -> None:
    plain = Question("Question: what?\nAnswer:", (" one thing", " one", " two things"), 1)
    assert question("arc_easy", {**CHOICE, "query": "Question: what?"}) == plain
    assert question("piqa", CHOICE) == plain
    assert question("copa", {**CHOICE, "query": "It rained, therefore"}).query == (
        "It rained, therefore"
    )
    passage = {"context": "I like", "continuation": "tea"}
    assert question("lambada", passage) == Question("I like", (" tea",), 0)
    with pytest.raises(InvalidInputError, match="choose from arc_easy"):
        question("boolq", CHOICE)


def test_the_likeliest_choice_is_taken_by_sum_and_by_byte() -> None:
    asked = question("piqa", CHOICE)  # of 9, 3 and 10 bytes
    scores = [(-4.5, False), (-2.0, False), (-4.0, False)]
    assert judge("piqa", asked, scores) == {"acc": True, "acc_norm": False}
    passage = Question("I like", (" tea",), 0)
    assert judge("lambada", passage, [(-1.0, True)]) == {"acc": True}


def test_rows_are_the_same_for_every_student_and_count(data: Path, tiny_student: Path) -> None:
    assert questions(data, "piqa", 6)[:3] == questions(data, "piqa", 3)
    assert len({asked.query for asked in questions(data, "piqa", 99)}) == 6
    phases: list[tuple[str, float]] = []
    one = correct(tiny_student / "bundle", data, rows=4, threads=1)
    two = correct(
        tiny_student / "bundle",
        data,
        rows=4,
        threads=3,
        report=lambda task, part: phases.append((task, part)),
    )
    assert one == two
    assert {len(rows) for rows in one.values()} == {4}
    assert phases[-1] == ("done", 1.0)
    assert [part for _, part in phases] == sorted(part for _, part in phases)


def test_the_mean_is_of_the_headlines() -> None:
    right = {metric: [True, False] for metric in HEADLINE} | {"piqa/acc": [True, True]}
    right["copa/acc"] = [True, True]
    found = shares(right)
    assert found["mean"] == pytest.approx((0.5 * 3 + 1.0) / 4)
    assert found["piqa/acc"] == 1.0


def test_absent_data_is_an_error_that_says_what_to_do(tmp_path: Path, tiny_student: Path) -> None:
    with pytest.raises(InvalidInputError, match="with --data"):
        correct(tiny_student / "bundle", tmp_path)
