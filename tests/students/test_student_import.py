"""Bringing models in: tokenizer, quantization, export, check, cache."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from cloud.students import check, export, importer, quantize, source
from edge.student.bundle import digest, read_harness
from edge.student.runtime import Answer, Decoding, Student
from protos.errors import ContextLengthError, IntegrityError, InvalidInputError
from protos.harness import Harness
from protos.prompt import Message, chat

if TYPE_CHECKING:
    from pathlib import Path

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
TEXTS = [
    "Hello  world\n\n  indented\ttabs",
    "naïve — 日本語 🏠 ñ ﷽ \u200b e\u0301",
    "007 123456 3.14159 1e-9 ٣٤",
    'def f(x: int) -> str:\n    return f"{x!r}"  # {"a": [1, 2]}\n',
    "<|im_start|>user\nhi<|im_end|>\n",
    " leading and trailing ",
]


def quiet(*_: object) -> None:
    """Progress that nobody watches."""


@pytest.mark.parametrize("text", TEXTS)
def test_the_packaged_tokenizer_round_trips_text_exactly(
    packaged: source.Source, text: str
) -> None:
    ids = packaged.tokenizer.encode(text, add_special_tokens=False).ids
    assert packaged.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_the_packaged_tokenizer_splits_digits_and_adds_no_beginning(
    packaged: source.Source,
) -> None:
    encoding = packaged.tokenizer.encode("2024")
    assert encoding.tokens == ["2", "0", "2", "4"]


@pytest.fixture(scope="module")
def packaged() -> source.Source:
    try:
        path = source.packaged_gguf()
    except InvalidInputError as error:
        pytest.skip(str(error))
    return source.load(path)


def test_rounding_is_to_nearest_and_stays_within_the_frozen_scales() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 64)).astype(np.float32)
    scales = quantize.make_scales(weight)
    codes = quantize.encode(weight, scales)
    error = np.abs(quantize.decode(codes, scales) - weight).reshape(8, 1, 64)
    assert (error <= scales[:, :, None] * 0.5001).all()
    louder = quantize.encode(weight * 10, scales)
    assert louder.min() >= 1
    assert louder.max() <= 255


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = np.full((1, 64), np.nan, dtype=np.float32)
    with pytest.raises(InvalidInputError, match="not finite"):
        quantize.make_scales(weight)


def test_the_exported_file_says_what_torch_says(tiny_folder: Path, tiny_student: Path) -> None:
    bundle = tiny_student / "bundle"
    said = check.answers(bundle)
    agreement = check.compare(source.load(tiny_folder), bundle, said, lambda _: None)
    assert agreement.prompts == 50
    assert agreement.equal_share > 0.9
    assert agreement.mean_kl < 0.01


@pytest.fixture
def imported(tiny_student: Path, tmp_path: Path) -> Path:
    """A copy of the imported tiny student that a test may change."""
    return shutil.copytree(tiny_student, tmp_path / "student")


def test_importing_the_same_input_again_is_not_redone(tiny_folder: Path, imported: Path) -> None:
    phases: list[str] = []
    harness = read_harness(imported / "bundle")
    first = importer.open_imported(imported)
    again = importer.bring_in(tiny_folder, harness, imported, lambda phase, _: phases.append(phase))
    assert again == first
    assert not phases
    other = importer.bring_in(tiny_folder, Harness(system="Other."), imported, quiet)
    assert other.digest != first.digest


def test_a_bundle_altered_on_disk_is_imported_anew(tiny_folder: Path, imported: Path) -> None:
    first = importer.open_imported(imported)
    harness = read_harness(imported / "bundle")
    (imported / "bundle" / "weights.bin").write_bytes(b"broken")
    with pytest.raises(IntegrityError, match="has changed"):
        importer.open_imported(imported)
    assert importer.bring_in(tiny_folder, harness, imported, quiet).digest == first.digest


def test_a_folder_with_other_files_is_not_overwritten(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(InvalidInputError, match="other files"):
        importer.bring_in(tiny_folder, Harness(), tmp_path, quiet)
    assert (tmp_path / "letter.txt").read_text() == "keep me"


def test_what_is_no_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InvalidInputError, match="Hugging Face folder"):
            importer.bring_in(path, Harness(), tmp_path / "out", quiet)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF nonsense")
    with pytest.raises(InvalidInputError, match="GGUF"):
        importer.bring_in(bad, Harness(), tmp_path / "out", quiet)


def test_unchanged_weights_write_back_the_same_digest(
    tiny_folder: Path, tiny_student: Path, tmp_path: Path
) -> None:
    base = tiny_student / "bundle"
    state = source.load(tiny_folder).model.state_dict()
    changed = export.write_back(base, state, read_harness(base), tmp_path / "same")
    assert changed == 0
    assert digest(tmp_path / "same") == digest(base)


def test_only_what_was_trained_changes_its_bytes(
    tiny_folder: Path, tiny_student: Path, tmp_path: Path
) -> None:
    base = tiny_student / "bundle"
    name = "model.layers.1.mlp.down_proj.weight"
    weight = source.load(tiny_folder).model.state_dict()[name]
    trained = {name: weight + 0.05 * torch.randn_like(weight)}
    changed = export.write_back(base, trained, read_harness(base), tmp_path / "next")
    layout = export.tensors_of(base)
    for tensor in layout.values():
        same = np.array_equal(
            export.read_tensor(base, tensor), export.read_tensor(tmp_path / "next", tensor)
        )
        assert same == (tensor.name != "layer.1.down")
    assert changed > 0


@pytest.fixture(scope="module")
def student(tiny_student: Path) -> Student:
    return Student.open(tiny_student / "bundle")


def same(one: Answer, other: Answer) -> bool:
    """Surprise is summed up in another order where more tokens are computed at once."""
    return replace(one, surprise=other.surprise) == other and one.surprise == pytest.approx(
        other.surprise, abs=0.02
    )


def ask(text: str) -> list[Message]:
    return chat("Be brief.", [Message("user", text)])


def test_answers_are_the_same_with_and_without_a_cached_prefix(student: Student) -> None:
    decoding = Decoding(max_tokens=10)
    fresh = student.answer(ask("turn the lamp on"), decoding)
    student.answer(ask("something else first"), decoding)
    assert same(student.answer(ask("turn the lamp on"), decoding), fresh)


def test_side_by_side_answers_are_the_single_ones(student: Student) -> None:
    chats = [ask(t) for t in ("a", "a much longer request than the others", "lamp", "on " * 9)]
    together = student.answer_all(chats, 10)
    for messages, answer in zip(chats, together, strict=True):
        alone = student.answer(messages, Decoding(max_tokens=10))
        assert same(answer, alone)


def test_a_stream_is_the_text_of_all_its_tokens(student: Student) -> None:
    """A random student ends in the middle of a character more often than not."""
    broken = 0
    for limit in range(1, 25):
        tokens = list(student.stream(ask("turn the lamp on"), Decoding(max_tokens=limit)))
        whole = student.tokenizer.decode([t.id for t in tokens])
        assert "".join(t.text for t in tokens) == whole
        shown = "".join(t.text for t in tokens[:-1])
        assert not shown.endswith(REPLACEMENT)  # it might have become a character
        broken += whole.endswith(REPLACEMENT)
    assert broken


def test_a_prompt_longer_than_the_context_is_a_clear_error(student: Student) -> None:
    with pytest.raises(ContextLengthError, match="shorten the prompt"):
        next(student.stream(ask("x" * 3000), Decoding(max_tokens=4)))
    assert student.answer(ask("still here"), Decoding(max_tokens=4)).completion_tokens > 0


def test_the_answer_ends_before_a_stop_text_even_across_tokens(student: Student) -> None:
    whole = student.answer(ask("turn the lamp on"), Decoding(max_tokens=12)).text
    assert len(whole) > 6
    stop = whole[3:6]
    cut = student.answer(ask("turn the lamp on"), Decoding(max_tokens=12, stop=(stop,))).text
    assert cut == whole[: whole.index(stop)]


def test_the_same_seed_samples_the_same_answer(student: Student) -> None:
    decoding = Decoding(max_tokens=12, temperature=1.0, seed=7)
    first = student.answer(ask("lamp"), decoding)
    assert same(student.answer(ask("lamp"), decoding), first)
    other = Decoding(max_tokens=12, temperature=1.0, seed=8)
    assert student.answer(ask("lamp"), other).text != first.text


def test_a_broken_bundle_cannot_be_opened(tiny_student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in (tiny_student / "bundle").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "graph.onnx").write_bytes(b"not a graph")
    with pytest.raises(IntegrityError, match="cannot be opened"):
        Student.open(folder)
