"""Room for a second student: what a device has, and what it may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.update.room import available_bytes, enough, has_room, needed_bytes

if TYPE_CHECKING:
    from pathlib import Path

MB = 1024 * 1024
sizes = st.integers(0, 1 << 40)


def group(folder: Path, *, high: str, most: str, used: int, droppable: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {droppable}\n")
    return folder


def meminfo(folder: Path, kilobytes: int) -> Path:
    file = folder / "meminfo"
    file.write_text(f"MemTotal: 9999999 kB\nMemAvailable:   {kilobytes} kB\n")
    return file


@pytest.mark.parametrize(
    ("high", "most", "left"),
    [
        ("max", "max", 500 * MB),  # the machine's
        ("max", str(400 * MB), 110 * MB),
        (str(350 * MB), str(400 * MB), 60 * MB),
        ("max", str(9000 * MB), 500 * MB),
    ],
)
def test_what_is_left_is_what_machine_and_service_manager_both_allow(
    tmp_path: Path, high: str, most: str, left: int
) -> None:
    own = group(tmp_path / "group", high=high, most=most, used=300 * MB, droppable=10 * MB)
    assert available_bytes(own, meminfo(tmp_path, 500 * 1024)) == left


def test_a_system_that_does_not_say_sets_no_bound(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path / "none") is None
    assert enough(10**12, available=None, limit=0, resident=0)


@given(sizes, sizes, sizes, sizes)
def test_more_memory_never_takes_room_away(
    needed: int, available: int, more: int, resident: int
) -> None:
    before = enough(needed, available=available, limit=0, resident=resident)
    assert enough(needed, available=available + more, limit=0, resident=resident) or not before


def test_a_limit_of_ones_own_is_kept(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    assert has_room(tmp_path, limit=0)
    assert not has_room(tmp_path, limit=needed_bytes(1000))  # this process takes memory, too
