"""Slots: what a killed build left is gone on with, and never kept by mistake."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from edge.delta.files import TEMPORARY
from edge.student.bundle import FILES, digest
from edge.update.slots import Slots
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path


def write(name: str, path: Path) -> None:
    path.write_text(name)


@pytest.fixture
def student(tmp_path: Path) -> str:
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in FILES:
        write(name, folder / name)
    return digest(folder)


def test_a_maker_finds_what_it_left_when_it_was_killed(tmp_path: Path, student: str) -> None:
    slots = Slots(tmp_path / "slots")
    left = tmp_path / "slots" / f"{student}{TEMPORARY}"
    left.mkdir()
    (left / "graph.onnx").write_text("finished before the kill")
    (left / f"weights.bin{TEMPORARY}").write_text("half")
    seen = []

    def go_on(path: Path) -> None:
        beginning = path.with_name(path.name + TEMPORARY)
        seen.append(beginning.read_text())
        write("weights.bin", path)

    makers = {name: partial(write, name) for name in FILES} | {"weights.bin": go_on}
    folder = slots.build(student, makers)
    assert seen == ["half"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert slots.check(student) == folder


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, student: str) -> None:
    slots = Slots(tmp_path / "slots")
    with pytest.raises(IntegrityError, match="came out as"):
        slots.build(student, {name: partial(write, "other") for name in FILES})
    assert not list((tmp_path / "slots").iterdir())
