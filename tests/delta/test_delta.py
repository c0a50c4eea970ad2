"""The delta codec: always the right file, or a clear error and no file."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import delta
from edge.delta import format as anbd
from edge.delta.format import Kind
from protos.errors import AnabranchError, IntegrityError, InvalidInputError, StorageError
from protos.errors import WrongBaseError as WrongBase

if TYPE_CHECKING:
    from pathlib import Path

    from tests.delta import delta_cases as cases
else:
    import delta_cases as cases


@pytest.fixture
def case(tmp_path: Path) -> cases.Case:
    """A delta with every kind of operation."""
    return cases.full(tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> cases.Case:
    """The same for tests that alter nothing of it."""
    return cases.full(tmp_path_factory.mktemp("kept"))


def refuse(base: Path, data: bytes, folder: Path) -> AnabranchError:
    """Apply ``data`` as a delta, which must fail and leave nothing behind."""
    bad, out = folder / "bad", folder / "out"
    bad.write_bytes(data)
    out.write_bytes(b"before")
    names = sorted(p.name for p in folder.iterdir())
    with pytest.raises(IntegrityError) as caught:
        delta.apply(base, bad, out, fsync=False)
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in folder.iterdir()) == names
    return caught.value


@settings(max_examples=60, deadline=None)
@given(
    base=st.binary(max_size=600),
    edits=st.lists(st.tuples(st.integers(0, 599), st.integers(0, 255)), max_size=40),
    more=st.binary(max_size=40),
    fewer=st.integers(0, 40),
)
def test_any_target_comes_out_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    base: bytes,
    edits: list[tuple[int, int]],
    more: bytes,
    fewer: int,
) -> None:
    folder = tmp_path_factory.mktemp("delta")
    target = bytearray(base)
    for place, value in edits:
        if place < len(target):
            target[place] = value
    target = target[: max(len(target) - fewer, 0)] + more
    (folder / "base").write_bytes(base)
    (folder / "target").write_bytes(target)
    info = delta.encode(folder / "base", folder / "target", folder / "delta")
    delta.apply(folder / "base", folder / "delta", folder / "out", fsync=False)
    assert (folder / "out").read_bytes() == target
    assert info.target_sha256 == hashlib.sha256(target).hexdigest()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    ranges=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30)), max_size=4),
    known=st.booleans(),
)
def test_any_target_comes_out_exactly_whatever_factors_are_sent(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    share: float,
    ranges: list[tuple[int, int]],
    known: bool,
) -> None:
    folder = tmp_path_factory.mktemp("delta")
    base = cases.weights(seed)
    updates, free = [], 0
    for first, rows in sorted(ranges):
        if first >= free and first + rows <= cases.ROWS:
            updates.append(delta.Update(cases.TENSOR_AT_0, first, cases.factors(seed, rows)))
            free = first + rows
    tensors = [cases.TENSOR_AT_0] if known or updates else []
    target = cases.nudged(base, seed, share)
    case = cases.Case.of(folder, base, target, tensors=tensors, updates=updates)
    delta.apply(case.base, case.made, folder / "out", fsync=False)
    assert (folder / "out").read_bytes() == target.tobytes()


def test_a_delta_of_every_operation_comes_out_exactly(case: cases.Case, tmp_path: Path) -> None:
    kinds = {o.kind for _, o in cases.operations(case.made.read_bytes())}
    assert kinds == set(Kind)
    delta.apply(case.base, case.made, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == case.target.read_bytes()


def test_files_of_many_regions_come_out_exactly(tmp_path: Path) -> None:
    size = 2 * anbd.MAX_REGION + 1234
    base = cases.codes(3, size)
    target = base.copy()
    lower, upper = anbd.MAX_REGION - 50_000, anbd.MAX_REGION + 70_000
    target[lower:upper] = cases.nudged(base[lower:upper], 4, 0.15)
    target[-400:] = cases.codes(9, 400)
    case = cases.Case.of(tmp_path, base, target)
    seen: list[tuple[int, int]] = []
    info = delta.encode(case.base, case.target, case.made, progress=lambda *p: seen.append(p))
    assert seen[-1] == (size, size)
    delta.apply(case.base, case.made, tmp_path / "out", progress=lambda *p: seen.append(p))
    assert seen[-1] == (size, size)
    assert (tmp_path / "out").read_bytes() == target.tobytes()
    assert info.changed_bytes == np.count_nonzero(base != target)
    assert info.size == case.made.stat().st_size
    assert info.sha256 == hashlib.sha256(case.made.read_bytes()).hexdigest()


def test_tensors_are_found_where_they_stand_now(tmp_path: Path) -> None:
    """A release whose layout changed: one tensor moved, one grew, one is new, one is gone."""

    def layout(*tensors: tuple[str, int, int]) -> dict[str, object]:
        at, found = 0, []
        for name, rows, columns in tensors:
            size = rows * columns
            raw = {"name": name, "dtype": "uint8", "shape": [rows, columns], "size": size}
            found += [raw | {"offset": at}]
            scales = {"name": f"{name}.scales", "dtype": "float32", "shape": [rows, columns // 32]}
            found += [scales | {"size": size // 8, "offset": at + size}]
            at += size + size // 8
        return {"tensors": found}

    old = layout(("a", 64, 64), ("b", 32, 64), ("gone", 32, 32))
    new = layout(("b", 32, 64), ("new", 8, 32), ("a", 64, 96))
    base, target = cases.codes(0, 8064), cases.codes(1, 9504)
    target[:2304] = cases.nudged(base[4608:6912], 3, 0.1)
    case = cases.Case.of(
        tmp_path,
        base,
        target,
        tensors=delta.tensors_in(old),
        stretches=delta.stretches_between(old, new),
    )
    first = cases.operations(case.made.read_bytes())[0][1]
    assert first.base >= 4608
    delta.apply(case.base, case.made, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == target.tobytes()
    assert delta.stretches_between(old, old) is None
    assert delta.tensors_in({}) == []


def test_one_step_changes_cost_about_their_entropy(tmp_path: Path) -> None:
    base = cases.codes(0, 1_000_000)
    rng = np.random.default_rng(1)
    step = rng.choice(np.array([0, 1, 255], np.uint8), base.size, p=[0.85, 0.075, 0.075])
    base.tofile(tmp_path / "base")
    (base + step).tofile(tmp_path / "target")
    info = delta.encode(tmp_path / "base", tmp_path / "target", tmp_path / "d")
    assert info.size < 1.03 * 0.76 / 8 * base.size


def test_scales_tell_where_changes_are_likely(tmp_path: Path) -> None:
    """A weight moves as far in a block of small scale: by more of its steps."""
    rows, columns = 512, 512
    rng = np.random.default_rng(0)
    scales = (2.0 ** rng.integers(0, 4, (rows, columns // 32))).astype("<f4")
    chance = np.repeat(0.4 / scales, 32, axis=1)
    base = np.concatenate([cases.codes(0, rows * columns), scales.view(np.uint8).ravel()])
    target = base.copy()
    target[: rows * columns] += (rng.random((rows, columns)) < chance).ravel()
    tensor = delta.Tensor(0, rows, columns, rows * columns, 32)
    cases.Case.of(tmp_path, base, target)
    files = tmp_path / "base", tmp_path / "target", tmp_path / "d"
    assert delta.encode(*files, tensors=[tensor]).size < 0.93 * delta.encode(*files).size


def test_identical_files_need_one_copy(tmp_path: Path) -> None:
    base = cases.codes(0, 20_000)
    case = cases.Case.of(tmp_path, base, base)
    assert case.made.stat().st_size == anbd.HEADER.size + anbd.OPERATION.size
    delta.apply(case.base, case.made, tmp_path / "out", fsync=False)
    assert (tmp_path / "out").read_bytes() == base.tobytes()


def test_a_plan_that_does_not_fit_is_refused(case: cases.Case) -> None:
    tensor = cases.TENSOR_AT_0
    some = delta.Update(tensor, 0, cases.factors(0, 10))
    far = delta.Tensor(0, 10**6, 64, 0, 32)
    for options in (
        {"tensors": [far]},
        {"tensors": [tensor, tensor]},
        {"updates": [some]},
        {"tensors": [tensor], "updates": [some, some]},
        {"tensors": [tensor], "updates": [delta.Update(tensor, 90, cases.factors(0, 10))]},
        {"tensors": [tensor], "updates": [some], "stretches": []},
        {"stretches": [delta.Stretch(0, 10**6, 10)]},
        {"stretches": [delta.Stretch(0, 0, 10), delta.Stretch(5, 0, 10)]},
    ):
        with pytest.raises(InvalidInputError, match="no delta"):
            delta.encode(case.base, case.target, case.made, **options)


def test_a_delta_can_replace_its_own_base(case: cases.Case) -> None:
    delta.apply(case.base, case.made, case.base)
    assert case.base.read_bytes() == case.target.read_bytes()


def test_a_truncated_delta_is_refused_wherever_it_ends(case: cases.Case, tmp_path: Path) -> None:
    data = case.made.read_bytes()
    cuts = {c + shift for c in (0, 4, *cases.boundaries(data)) for shift in (-1, 0, 1)}
    cuts |= set(np.random.default_rng(0).integers(0, len(data), 40).tolist())
    for cut in sorted(c for c in cuts if 0 <= c < len(data)):
        assert "delta" in str(refuse(case.base, data[:cut], tmp_path))
    assert "goes on" in str(refuse(case.base, data + b"\0", tmp_path))


def test_a_flipped_bit_never_makes_a_wrong_file(kept: cases.Case, tmp_path: Path) -> None:
    data, target = kept.made.read_bytes(), kept.target.read_bytes()
    rng = np.random.default_rng(0)
    heads = [range(at, at + anbd.OPERATION.size) for at, _ in cases.operations(data)]
    places = {*range(anbd.HEADER.size), *(i for head in heads for i in head)}
    places |= set(rng.integers(0, len(data), 150).tolist())
    for place in sorted(places):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        right_or_refused(kept.base, bytes(flipped), target, tmp_path)


def right_or_refused(base: Path, data: bytes, target: bytes, folder: Path) -> bool:
    """An altered delta may still say the same; else it is refused and leaves nothing."""
    bad, out = folder / "bad", folder / "out"
    bad.write_bytes(data)
    try:
        delta.apply(base, bad, out, fsync=False)
    except AnabranchError:
        assert [p.name for p in folder.iterdir()] == ["bad"]
        return False
    assert out.read_bytes() == target
    out.unlink()
    return True


def test_no_delta_of_the_corpus_makes_a_wrong_file(kept: cases.Case, tmp_path: Path) -> None:
    data, target = kept.made.read_bytes(), kept.target.read_bytes()
    outcomes = [
        right_or_refused(kept.base, altered, target, tmp_path)
        for altered in cases.corpus(data, seed=0, count=420)
    ]
    assert len(outcomes) > 350
    assert sum(outcomes) < 20


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), start=st.integers(0, 100))
def test_garbage_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: int
) -> None:
    folder = tmp_path_factory.mktemp("delta")
    base = cases.codes(0, 300).tobytes()
    (folder / "base").write_bytes(base)
    digest = hashlib.sha256(base).hexdigest()
    head = anbd.Header(digest, "11" * 32, 300, 300, 0).pack()
    refuse(folder / "base", head[: 100 - start] + data, folder)


def test_a_wrong_base_is_named_before_anything_is_written(case: cases.Case, tmp_path: Path) -> None:
    data = case.made.read_bytes()
    assert isinstance(refuse(case.target, data, tmp_path), WrongBase)
    case.base.write_bytes(case.base.read_bytes()[:-1])
    error = refuse(case.base, data, tmp_path)
    assert isinstance(error, WrongBase)
    assert "fetch the full file" in str(error)


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_is_refused_by_name(case: cases.Case, tmp_path: Path, version: int) -> None:
    data = bytearray(case.made.read_bytes())
    struct.pack_into("<H", data, 4, version)
    assert f"version {version}" in str(refuse(case.base, bytes(data), tmp_path))


def lying(case: cases.Case, *operations: tuple[object, ...], tensors: bytes = b"") -> bytes:
    """A delta of these operations, for that case's files."""
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (case.base, case.target)]
    sizes = case.base.stat().st_size, case.target.stat().st_size
    header = anbd.Header(digests[0], digests[1], *sizes, len(tensors) // anbd.TENSOR.size)
    heads = b"".join(anbd.OPERATION.pack(*numbers) for numbers in operations)
    return header.pack() + tensors + heads


@pytest.mark.parametrize(
    "operation",
    [
        (0, 1, 0, 0, 0),
        (5, 1, 0, 0, 0),
        (Kind.COPY, 0, 0, 0, 0),
        (Kind.COPY, 1, 2**64 - 1, 0, 0),
        (Kind.COPY, 2**32 - 1, 0, 0, 0),
        (Kind.COPY, 1, 0, 1, 0),
        (Kind.COPY, 1, 0, 0, 1),
        (Kind.CODES, anbd.MAX_REGION + 1, 0, 0, 0),
        (Kind.CODES, 0, 0, 9, 0),
        (Kind.CODES, 8, 2**40, 9, 0),
        (Kind.CODES, 8, 0, 2**32 - 1, 0),
        (Kind.FRESH, anbd.MAX_REGION + 1, 0, 9, 0),
        (Kind.FRESH, 9, 1, 9, 0),
        (Kind.FRESH, 9, 0, 2**32 - 1, 0),
        (Kind.FACTORS, 1, 0, 9, 0),
        (Kind.FACTORS, 0, 1, 9, 0),
        (Kind.FACTORS, 0, 0, 2**32 - 1, 0),
    ],
)
def test_lying_numbers_are_refused_before_memory_is_taken(
    kept: cases.Case, tmp_path: Path, operation: tuple[int, ...]
) -> None:
    assert "bounds" in str(refuse(kept.base, lying(kept, operation), tmp_path))


@pytest.mark.parametrize(
    "tensor",
    [
        (0, 2**32 - 1, 2**31, 0, 32),
        (0, 0, 64, 0, 32),
        (0, 4, 33, 0, 32),
        (0, 4, 64, 0, 0),
        (0, 4, 64, 0, 128),
        (0, 4, 64, 2**63, 32),
        (2**63, 1, 32, 0, 32),
    ],
)
def test_lying_tensors_are_refused(
    kept: cases.Case, tmp_path: Path, tensor: tuple[int, ...]
) -> None:
    data = lying(kept, tensors=anbd.TENSOR.pack(*tensor))
    assert "bounds" in str(refuse(kept.base, data, tmp_path))


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_a_full_disk_leaves_no_partial_output(
    case: cases.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"before")
    names = sorted(p.name for p in tmp_path.iterdir())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match="No space left"):
            delta.apply(case.base, case.made, out)
        with pytest.raises(StorageError, match="No space left"):
            delta.encode(case.base, case.target, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert out.read_bytes() == b"before"
    delta.apply(case.base, case.made, out)
    assert out.read_bytes() == case.target.read_bytes()


def test_a_missing_file_is_a_storage_error(case: cases.Case, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent"):
        delta.apply(tmp_path / "absent", case.made, tmp_path / "out")
    with pytest.raises(StorageError, match="absent"):
        delta.read_header(tmp_path / "absent")
    with pytest.raises(StorageError, match="absent"):
        delta.encode(case.base, tmp_path / "absent", tmp_path / "out")
