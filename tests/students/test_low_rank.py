"""Updates as products: in the bytes asked for, near to what was learnt, and exact to send."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from cloud.students import export, low_rank, quantize, source
from edge import delta
from edge.student.bundle import digest, read_config, read_harness
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

    State = dict[str, torch.Tensor]

NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def before(tiny_folder: Path) -> State:
    return {n: v.float() for n, v in source.load(tiny_folder).model.state_dict().items()}


@pytest.fixture(scope="module")
def learnt(before: State) -> State:
    """An update of rank 4 of some matrices of the upper layer, and of a norm."""
    torch.manual_seed(0)
    found = {"model.norm.weight": before["model.norm.weight"] + 0.1}
    for name in (f"model.layers.1.{n}.weight" for n in NAMES):
        rows, columns = before[name].shape
        found[name] = before[name] + 1e-3 * torch.randn(rows, 4) @ torch.randn(4, columns)
    return found


def reached(base: Path, bundle: Path, learnt: State, before: State) -> float:
    """How far the codes went the learnt way: 1 is all of it. Rounding's noise is no way."""
    layout = export.tensors_of(base)
    done = asked = 0.0
    for tensor in layout.values():
        if tensor.dtype == "uint8" and any(n in learnt for n in tensor.sources):
            scales = np.array(export.read_tensor(base, layout[f"{tensor.name}.scales"]))
            old, new = (
                quantize.decode(np.array(export.read_tensor(b, tensor)), scales)
                for b in (base, bundle)
            )
            way = torch.cat([learnt.get(n, before[n]) - before[n] for n in tensor.sources]).numpy()
            done += float(((new - old) * way).sum())
            asked += float((way * way).sum())
    return done / asked


def test_products_come_near_to_what_was_learnt(
    tiny_student: Path, before: State, learnt: State, tmp_path: Path
) -> None:
    base = tiny_student / "bundle"
    parts = []
    for budget in (600, 6000):
        out = tmp_path / str(budget)
        updates = low_rank.products(base, before, learnt, budget=budget)
        low_rank.write_products(base, updates, learnt, read_harness(base), out)
        parts.append(reached(base, out, learnt, before))
    assert parts[0] < parts[1]
    assert 0.9 < parts[1] < 1.1


def test_what_is_sent_is_the_bundle_byte_for_byte(
    tiny_student: Path, before: State, learnt: State, tmp_path: Path
) -> None:
    base, out = tiny_student / "bundle", tmp_path / "candidate"
    updates = low_rank.products(base, before, learnt, budget=4000, phase=40503)
    low_rank.write_products(base, updates, learnt, read_harness(base), out)
    delta.save_updates(updates, tmp_path / "updates.npz")
    files = base / "weights.bin", out / "weights.bin", tmp_path / "made"
    tensors = delta.tensors_in(read_config(base))
    kept = delta.load_updates(tmp_path / "updates.npz")
    info = delta.encode(*files, tensors=tensors, updates=kept)
    norm = before["model.norm.weight"]
    assert 0 < info.changed_bytes <= 4 * norm.numel()
    assert info.size < 4000 + 1500
    delta.apply(files[0], files[2], tmp_path / "applied")
    assert (tmp_path / "applied").read_bytes() == files[1].read_bytes()


def test_nothing_learnt_is_no_update(tiny_student: Path, before: State, tmp_path: Path) -> None:
    base = tiny_student / "bundle"
    assert low_rank.products(base, before, dict(before), budget=1000) == []
    low_rank.write_products(base, [], {}, read_harness(base), tmp_path / "same")
    assert digest(tmp_path / "same") == digest(base)


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04cut"])
def test_a_file_without_updates_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "updates.npz").write_bytes(content)
    with pytest.raises(IntegrityError, match="make them again"):
        delta.load_updates(tmp_path / "updates.npz")
