"""Requests that a model writes itself."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer

from cloud import adapt
from cloud.learners import prompts
from cloud.learners.config import LearnerConfig
from cloud.students import check, importer, magpie, source
from cloud.students.magpie import Written, write
from protos.errors import IntegrityError, InvalidInputError
from protos.harness import Harness
from protos.prompt import IM_END
from tests.conftest import make_tiny_folder

if TYPE_CHECKING:
    from pathlib import Path


_SAMPLES = 12


@pytest.fixture(scope="module")
def packaged() -> source.Source:
    try:
        path = source.packaged_gguf()
    except InvalidInputError as error:
        pytest.skip(str(error))
    return source.load(path)


@pytest.fixture(scope="module")
def written(packaged: source.Source) -> list[Written]:
    return write(packaged, seed=1, progress=lambda _: None, samples=_SAMPLES)


def test_the_packaged_student_writes_requests_and_answers_them(written: list[Written]) -> None:
    assert len(written) >= 3
    assert all(len(w.request) > 8 and w.answer for w in written)
    assert len({w.request for w in written}) == len(written)


def test_what_the_gate_asks_is_never_written(
    packaged: source.Source, written: list[Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = (w.request for w in written)
    monkeypatch.setattr(magpie, "GATE", (f"{first.upper()} ?",))
    again = write(packaged, seed=1, progress=lambda _: None, samples=_SAMPLES)
    assert [w.request for w in again] == others


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> source.Source:
    """A random tiny model that often ends its turn."""
    made = source.load(make_tiny_folder(tmp_path_factory.mktemp("talkative")))
    end = made.tokenizer.token_to_id(IM_END)
    head = made.model.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    head.bias.data[end] = 4.0
    head.bias.data[[0, 1]] = -100.0
    return made


def test_the_same_seed_writes_the_same_and_another_writes_other(talkative: source.Source) -> None:
    def said(seed: int) -> list[Written]:
        return write(talkative, seed=seed, progress=lambda _: None, samples=32)

    assert said(1)
    assert said(1) == said(1)
    assert said(1) != said(2)


def test_progress_ends_at_one(talkative: source.Source) -> None:
    told: list[float] = []
    write(talkative, seed=1, progress=told.append, samples=32)
    assert told == sorted(told)
    assert told[-1] == 1.0


def test_a_text_with_a_special_token_is_thrown_away(talkative: source.Source) -> None:
    talkative.model.lm_head.bias.data[0] = 100.0  # says nothing but <|endoftext|>
    try:
        assert write(talkative, seed=1, progress=lambda _: None, samples=8) == []
    finally:
        talkative.model.lm_head.bias.data[0] = -100.0


def job_of(imported: importer.Imported) -> adapt.Spec:
    return adapt.Spec(
        masters=imported.masters,
        learnt=None,
        base=imported.bundle,
        current=imported.bundle,
        train=(),
        held_out=(),
        replay=(),
        earlier=(),
    )


def test_anchors_hold_what_was_written_and_a_cut_answer_has_no_end(
    tiny_folder: Path, tmp_path: Path
) -> None:
    harness = Harness(system="Be brief.", max_tokens=6)
    imported = importer.bring_in(tiny_folder, harness, tmp_path / "student", lambda *_: None)
    spec = job_of(imported)
    keep = imported.masters / importer.WRITTEN
    keep.write_text("")
    with pytest.raises(IntegrityError, match="import the student again"):
        adapt.course(spec)
    keep.write_text("[]")
    before = adapt.course(spec).anchors
    said = [
        Written("how?", "so", ended=True),
        Written("why?", "because", ended=False),
        Written("say: what is DNA?", "a prompt of the gate", ended=True),
    ]
    keep.write_text(json.dumps([asdict(w) for w in said]))
    ended, cut = (a for a in adapt.course(spec).anchors if a not in before)
    tokenizer = Tokenizer.from_file(str(imported.bundle / "tokenizer.json"))

    def text(ids: tuple[int, ...]) -> str:
        words: str = tokenizer.decode(list(ids), skip_special_tokens=False)
        return words

    turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert [text(ended.prompt), text(cut.prompt)] == [turns.format("how?"), turns.format("why?")]
    assert [text(ended.answer), text(cut.answer)] == ["so<|im_end|>", "because"]


def test_an_answer_that_the_import_cut_gets_no_end(tiny_folder: Path, tmp_path: Path) -> None:
    imported = importer.bring_in(
        tiny_folder,
        Harness(system="Be brief.", max_tokens=6),
        tmp_path / "student",
        lambda *_: None,
    )
    (imported.masters / importer.WRITTEN).write_text("[]")
    short, long = prompts.ANCHOR[:2]
    said = dict.fromkeys(check.PROMPTS, "") | {short: "a", long: "a" * 60}
    (imported.masters / importer.ANSWERS).write_text(json.dumps(said))
    spec = replace(job_of(imported), learner=LearnerConfig(anchor_tokens=50))
    whole, cut = (a.answer for a in adapt.course(spec).anchors[:2])
    assert len(cut) == check.ANSWER_TOKENS
    assert whole[-1] not in cut


def test_a_learner_without_anchors_has_none(tiny_student: Path) -> None:
    spec = job_of(importer.open_imported(tiny_student))
    none = replace(spec, learner=LearnerConfig(anchor_batch=0))
    assert adapt.course(none).anchors == ()
    assert len(adapt.course(spec).anchors) > len(prompts.SHOWN)
