"""What learnt weights become: products where they do, codes where they do not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from cloud.students import candidates as made_of
from cloud.students import export
from cloud.students.candidates import Candidate, Work, candidates
from edge.student.bundle import digest, read_harness

if TYPE_CHECKING:
    from pathlib import Path

    State = dict[str, torch.Tensor]

SHARE = 0.02
ROUNDING = 12**-0.5  # of a step, root mean square


@pytest.fixture(scope="module")
def before(wide_student: Path) -> State:
    return {n: v.float() for n, v in load_file(wide_student / "masters/model.safetensors").items()}


def moved(before: State, seed: int) -> State:
    """An update of low rank of the upper layer's matrices, and of a norm."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, value in before.items():
        if ".layers.1." in name and value.ndim == 2:
            left = torch.randn(len(value), 3, generator=draw)
            right = torch.randn(3, value.shape[1], generator=draw)
            found[name] = value + 2e-4 * left @ right
    return {**found, "model.norm.weight": before["model.norm.weight"] + 0.1}


@pytest.fixture
def work(wide_student: Path, before: State) -> Work:
    bundle = wide_student / "bundle"
    return Work(wide_student / "masters", {}, moved(before, 0), bundle, bundle)


def chosen(work: Work, out: Path, *, way: str = "products", share: float = SHARE) -> Candidate:
    return next(c for c in candidates(work, out, share=share) if c.way == way)


def way(one: State, other: State) -> torch.Tensor:
    return torch.cat([(one[n] - other[n]).flatten() for n in one if one[n].ndim == 2])


def test_products_come_first_and_stand_for_nearly_what_was_learnt(
    work: Work, before: State, tmp_path: Path
) -> None:
    found = chosen(work, tmp_path / "out")
    assert found.parameters.keys() == work.learnt.keys()
    asked, given = way(dict(work.learnt), before), way(found.parameters, before)
    assert float(torch.linalg.vector_norm(given - asked) / torch.linalg.vector_norm(asked)) < 0.2
    norm = "model.norm.weight"
    assert torch.equal(found.parameters[norm], work.learnt[norm])
    assert found.changed > 0
    assert ROUNDING * 0.9 < found.noise < 0.5


def test_products_are_made_only_where_they_save_bytes(
    work: Work, before: State, tmp_path: Path
) -> None:
    products, codes = candidates(work, tmp_path / "out", share=SHARE)
    assert products.delta_bytes < codes.delta_bytes
    norm = "model.norm.weight"
    little = replace(work, learnt={norm: before[norm] + 0.1})  # which no product can give
    assert [c.way for c in candidates(little, tmp_path / "little", share=SHARE)] == ["codes"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["little", "out"]


def test_codes_come_last_and_are_rounded_from_what_was_learnt(work: Work, tmp_path: Path) -> None:
    found = list(candidates(work, tmp_path / "out", share=SHARE))
    assert [c.way for c in found] == ["products", "codes"]
    harness = read_harness(work.base)
    export.write_back(work.base, work.learnt, harness, tmp_path / "rounded")
    assert digest(tmp_path / "out") == digest(tmp_path / "rounded")
    assert found[-1].updates == ()
    assert found[-1].parameters.keys() == work.learnt.keys()
    assert found[-1].noise == pytest.approx(ROUNDING, rel=0.05)


def test_without_a_share_there_are_codes_only(work: Work, tmp_path: Path) -> None:
    assert [c.way for c in candidates(work, tmp_path / "out", share=0)] == ["codes"]


def test_products_for_codes_far_from_those_in_service_are_not_made(
    work: Work, before: State, tmp_path: Path
) -> None:
    far = {n: v + 0.05 if v.ndim == 2 else v for n, v in moved(before, 1).items()}
    mixed = replace(work, before=far, learnt={n: v + 1e-3 for n, v in far.items()})
    assert [c.way for c in candidates(mixed, tmp_path / "out", share=SHARE)] == ["codes"]


def test_noise_adds_up_over_releases_until_codes_take_it_away(
    work: Work, before: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made_of, "MOST_NOISE", 0.5)
    seen: list[tuple[str, float]] = []
    for release in range(12):
        learnt = moved({**before, **work.before}, release)
        work = replace(work, learnt=learnt)
        out = tmp_path / str(release)
        found = next(candidates(work, out, share=SHARE))
        seen.append((found.way, found.noise))
        work = replace(work, before=found.parameters, current=out, release=release + 1)
        if found.way == "codes":
            break
    *products, last = seen
    assert {w for w, _ in products} == {"products"}
    assert len(products) > 1
    assert [n for _, n in products] == sorted(n for _, n in products)
    assert last[0] == "codes"
    assert last[1] == pytest.approx(ROUNDING, rel=0.05)


def test_the_same_codes_do_not_take_the_same_update_again(
    work: Work, before: State, tmp_path: Path
) -> None:
    first = chosen(work, tmp_path / "first")
    again = {n: 2 * v - before[n] for n, v in first.parameters.items()}
    next_one = replace(work, before=first.parameters, learnt=again, current=tmp_path / "first")
    after = {
        release: chosen(replace(next_one, release=release), tmp_path / str(release)).noise
        for release in (0, 1)  # 0: one dither for both
    }
    assert after[1] - first.noise < (after[0] - first.noise) / 2
