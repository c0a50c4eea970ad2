"""The delta codec: always the right file, or a clear error and no file."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import delta
from edge.delta import format as anbd
from protos.errors import IntegrityError, InvalidInputError, StorageError, WrongBaseError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SIZE = 20_000


def codes(seed: int, size: int = SIZE) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).normal(128, 30, size).clip(0, 255).astype(np.uint8)


def nudged(base: npt.NDArray[np.uint8], seed: int, share: float) -> npt.NDArray[np.uint8]:
    """As training moves codes: a share of them by one step, a few by more."""
    rng = np.random.default_rng(seed)
    target = base.copy()
    moved = rng.random(base.size) < share
    target[moved] += rng.choice(
        np.array([1, 255, 2, 17], np.uint8), moved.sum(), p=[0.48, 0.48, 0.03, 0.01]
    )
    return target


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, a target, and the delta between them."""
    base, target, out = (tmp_path / n for n in ("base", "target", "delta"))
    base.write_bytes(codes(0).tobytes())
    target.write_bytes(nudged(codes(0), 1, 0.15).tobytes())
    delta.encode(base, target, out)
    return base, target, out


def refuse(base: Path, data: bytes, folder: Path) -> Exception:
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
)
def test_any_target_comes_out_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    base: bytes,
    edits: list[tuple[int, int]],
) -> None:
    folder = tmp_path_factory.mktemp("delta")
    target = bytearray(base)
    for place, value in edits:
        if place < len(target):
            target[place] = value
    (folder / "base").write_bytes(base)
    (folder / "target").write_bytes(target)
    info = delta.encode(folder / "base", folder / "target", folder / "delta")
    delta.apply(folder / "base", folder / "delta", folder / "out", fsync=False)
    assert (folder / "out").read_bytes() == target
    assert info.target_sha256 == hashlib.sha256(target).hexdigest()


def test_files_of_many_regions_come_out_exactly(tmp_path: Path) -> None:
    size = 2 * anbd.MAX_REGION + 1234
    base = codes(3, size)
    target = base.copy()
    lower, upper = anbd.MAX_REGION - 50_000, anbd.MAX_REGION + 70_000
    target[lower:upper] = nudged(base[lower:upper], 4, 0.15)
    target[-400:] = codes(9, 400)
    base.tofile(tmp_path / "base")
    target.tofile(tmp_path / "target")
    seen: list[tuple[int, int]] = []
    info = delta.encode(
        tmp_path / "base", tmp_path / "target", tmp_path / "d", progress=lambda *p: seen.append(p)
    )
    assert seen[-1] == (size, size)
    delta.apply(
        tmp_path / "base", tmp_path / "d", tmp_path / "out", progress=lambda *p: seen.append(p)
    )
    assert seen[-1] == (size, size)
    assert (tmp_path / "out").read_bytes() == target.tobytes()
    assert info.changed_bytes == np.count_nonzero(base != target)
    assert info.size == (tmp_path / "d").stat().st_size
    assert info.sha256 == hashlib.sha256((tmp_path / "d").read_bytes()).hexdigest()
    assert delta.read_header(tmp_path / "d").regions == 3


def test_one_step_changes_cost_about_their_entropy(tmp_path: Path) -> None:
    base = codes(0, 1_000_000)
    rng = np.random.default_rng(1)
    step = rng.choice(np.array([0, 1, 255], np.uint8), base.size, p=[0.85, 0.075, 0.075])
    base.tofile(tmp_path / "base")
    (base + step).tofile(tmp_path / "target")
    info = delta.encode(tmp_path / "base", tmp_path / "target", tmp_path / "d")
    assert info.size < 1.05 * 0.76 / 8 * base.size


def test_identical_files_need_a_header_only(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(codes(0).tobytes())
    info = delta.encode(tmp_path / "base", tmp_path / "base", tmp_path / "d")
    assert info.size == anbd.HEADER.size
    delta.apply(tmp_path / "base", tmp_path / "d", tmp_path / "out", fsync=False)
    assert (tmp_path / "out").read_bytes() == codes(0).tobytes()


def test_files_of_other_sizes_have_no_delta(files: tuple[Path, Path, Path]) -> None:
    base, target, made = files
    target.write_bytes(target.read_bytes() + b"more")
    with pytest.raises(InvalidInputError, match="ship the full file"):
        delta.encode(base, target, made)


def test_a_delta_can_replace_its_own_base(files: tuple[Path, Path, Path]) -> None:
    base, target, made = files
    delta.apply(base, made, base)
    assert base.read_bytes() == target.read_bytes()


def test_a_truncated_delta_is_refused_wherever_it_ends(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, _, made = files
    data = made.read_bytes()
    head = anbd.Region(*anbd.REGION.unpack_from(data, anbd.HEADER.size))
    body = anbd.HEADER.size + anbd.REGION.size
    parts = (body, body + head.mask_size, body + head.mask_size + head.steps_size)
    boundaries = [0, 4, anbd.HEADER.size, *parts, len(data)]
    cuts = {c + shift for c in boundaries for shift in (-1, 0, 1)}
    cuts |= set(np.random.default_rng(0).integers(0, len(data), 40).tolist())
    for cut in sorted(c for c in cuts if 0 <= c < len(data)):
        assert "delta" in str(refuse(base, data[:cut], tmp_path))
    assert "more or less" in str(refuse(base, data + b"\0", tmp_path))


def test_a_flipped_bit_never_makes_a_file(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, target, made = files
    data = made.read_bytes()
    rng = np.random.default_rng(0)
    places = {
        *range(anbd.HEADER.size + anbd.REGION.size),
        *rng.integers(0, len(data), 150).tolist(),
    }
    for place in sorted(places):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        refuse(base, bytes(flipped), tmp_path)
    delta.apply(base, made, tmp_path / "fine", fsync=False)
    assert (tmp_path / "fine").read_bytes() == target.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200), start=st.integers(0, 100))
def test_garbage_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: int
) -> None:
    folder = tmp_path_factory.mktemp("delta")
    base = codes(0, 300).tobytes()
    (folder / "base").write_bytes(base)
    digest = hashlib.sha256(base).hexdigest()
    head = anbd.Header(digest, "11" * 32, 300, 1, 1).pack()
    refuse(folder / "base", head[: 100 - start] + data, folder)


def test_a_wrong_base_is_named_before_anything_is_written(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, target, made = files
    data = made.read_bytes()
    assert isinstance(refuse(target, data, tmp_path), WrongBaseError)
    base.write_bytes(base.read_bytes()[:-1])
    error = refuse(base, data, tmp_path)
    assert isinstance(error, WrongBaseError)
    assert "fetch the full file" in str(error)


def test_another_version_is_refused_by_name(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, made = files
    data = bytearray(made.read_bytes())
    struct.pack_into("<H", data, 4, 2)
    assert "version 2" in str(refuse(base, bytes(data), tmp_path))


def lying(base: Path, target: Path, raw: bytes, **head: int) -> bytes:
    """A delta of one region whose mask is a zstd frame of ``raw``."""
    frame = zstandard.ZstdCompressor().compress(raw)
    size = base.stat().st_size
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (base, target)]
    header = anbd.Header(digests[0], digests[1], size, 1, 1)
    region = replace(anbd.Region(0, 8, 1, 0, len(frame), 0, 0), **head)
    return header.pack() + region.pack() + frame


@pytest.mark.parametrize(
    "head",
    [
        {"length": anbd.MAX_REGION + 1},
        {"length": 0},
        {"offset": SIZE},
        {"offset": 2**64 - 1},
        {"changed": 9},
        {"changed": 0},
        {"escapes": 2},
        {"mask_size": 2**32 - 1},
        {"steps_size": 2**32 - 1},
        {"escapes_size": 2**32 - 1},
    ],
)
def test_lying_sizes_are_refused_before_memory_is_taken(
    files: tuple[Path, Path, Path], tmp_path: Path, head: dict[str, int]
) -> None:
    base, target, _ = files
    assert "bounds" in str(refuse(base, lying(base, target, b"\x80", **head), tmp_path))


def test_a_zip_bomb_is_not_unpacked(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, target, _ = files
    bomb = lying(base, target, bytes(1 << 20))
    assert len(bomb) < 1000
    assert "not of 1 bytes" in str(refuse(base, bomb, tmp_path))


def test_a_frame_that_lies_about_its_size_is_refused(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, target, _ = files
    honest = lying(base, target, bytes(200))
    frame = zstandard.ZstdCompressor().compress(bytes(200))
    at = honest.index(frame)
    assert frame[5] == 200  # a one-byte content size
    liar = honest[: at + 5] + b"\x01" + honest[at + 6 :]
    assert "decompress" in str(refuse(base, liar, tmp_path))


def test_masks_and_counts_must_agree(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, target, _ = files
    compress = zstandard.ZstdCompressor().compress
    mask, steps, none = compress(b"\xc0"), compress(b"\x01"), compress(b"")
    sizes = {"mask_size": len(mask), "steps_size": len(steps), "escapes_size": len(none)}
    data = lying(base, target, b"\xc0", **sizes)
    error = refuse(base, data + steps + none, tmp_path)
    assert "other changes" in str(error)


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_a_full_disk_leaves_no_partial_output(
    files: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    base, target, made = files
    out = tmp_path / "out"
    out.write_bytes(b"before")
    names = sorted(p.name for p in tmp_path.iterdir())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match="No space left"):
            delta.apply(base, made, out)
        with pytest.raises(StorageError, match="No space left"):
            delta.encode(base, target, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert out.read_bytes() == b"before"
    delta.apply(base, made, out)
    assert out.read_bytes() == target.read_bytes()


def test_a_missing_file_is_a_storage_error(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, made = files
    with pytest.raises(StorageError, match="absent"):
        delta.apply(tmp_path / "absent", made, tmp_path / "out")
    with pytest.raises(StorageError, match="absent"):
        delta.read_header(tmp_path / "absent")
    with pytest.raises(StorageError, match="absent"):
        delta.encode(base, tmp_path / "absent", tmp_path / "out")


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Run in a process of its own, whose peak is compared with an idle one's."""
    import subprocess
    import sys

    size = 24 << 20
    base = codes(5, size)
    base.tofile(tmp_path / "base")
    nudged(base, 6, 0.15).tofile(tmp_path / "target")
    script = (
        "import resource, sys; from pathlib import Path; from edge import delta\n"
        "b, t, d, o = (Path(sys.argv[1]) / n for n in ('base', 'target', 'd', 'o'))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "idle = peak(); delta.encode(b, t, d); one = peak()\n"
        "delta.apply(b, d, o, fsync=False); print(one - idle, peak() - idle)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert max(int(kib) for kib in done.stdout.split()) < 32 << 10
