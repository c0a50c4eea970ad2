"""Files by their content."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from cloud.releases.blobs import Blobs
from protos.errors import IntegrityError, InvalidInputError, StorageError

DATA = b"codes" * 100


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(folder=tmp_path / "blobs")


def test_a_file_is_taken_in_without_copying_and_found_by_its_sha256(
    blobs: Blobs, source: Path
) -> None:
    blob = blobs.put(source)
    assert blob.sha256 == hashlib.sha256(DATA).hexdigest()
    assert blobs.path(blob.sha256).samefile(source)
    assert blobs.read(blob.sha256, 5, 5) == (b"codes", len(DATA))
    assert blobs.put(source) == blob
    assert [p.name for p in blobs.path(blob.sha256).parent.iterdir()] == [blob.sha256]


def test_a_symbolic_link_is_followed(blobs: Blobs, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    blob = blobs.put(tmp_path / "link")
    assert not blobs.path(blob.sha256).is_symlink()


def test_where_hard_links_do_not_work_the_file_is_copied(
    blobs: Blobs, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    blob = blobs.put(source)
    assert not blobs.path(blob.sha256).samefile(source)
    assert blobs.read(blob.sha256, 0, 1 << 20) == (DATA, len(DATA))


def test_a_range_past_the_end_is_cut_and_past_all_bounds_is_empty(
    blobs: Blobs, source: Path
) -> None:
    sha256 = blobs.put(source).sha256
    assert blobs.read(sha256, len(DATA) - 3, 100) == (b"des", len(DATA))
    assert blobs.read(sha256, len(DATA), 100) == (b"", len(DATA))
    assert blobs.read(sha256, 2**64 - 1, 100) == (b"", len(DATA))


def test_what_the_system_has_cached_is_read_without_waiting_and_nothing_that_was_not_hashed(
    blobs: Blobs, source: Path
) -> None:
    sha256 = blobs.put(source).sha256
    for at, length in ((5, 5), (len(DATA) - 3, 100), (len(DATA), 1), (2**64 - 1, 1)):
        found = blobs.read_cached(sha256, at, length)
        assert found in (None, blobs.read(sha256, at, length)), "not every file system can"
    os.utime(source, ns=(1, 1))
    assert blobs.read_cached(sha256, 0, 5) is None
    assert blobs.read_cached("ab" * 32, 0, 5) is None


def test_what_was_written_through_a_shared_file_is_noticed_and_healed_by_the_right_one(
    blobs: Blobs, source: Path, tmp_path: Path
) -> None:
    sha256 = blobs.put(source).sha256
    shutil.copyfile(source, tmp_path / "kept")
    with source.open("r+b") as file:
        file.write(b"x")
        os.utime(file.fileno(), ns=(1, 1))
    with pytest.raises(IntegrityError, match="publish its bundle again"):
        blobs.read(sha256, 0, 1)
    blobs.put(tmp_path / "kept")
    assert blobs.read(sha256, 0, 5) == (b"codes", len(DATA))


def test_a_file_that_was_only_touched_is_still_good(blobs: Blobs, source: Path) -> None:
    sha256 = blobs.put(source).sha256
    os.utime(source, ns=(1, 1))
    blobs.check(sha256)


def test_damage_while_the_cloud_was_down_is_noticed(
    blobs: Blobs, source: Path, tmp_path: Path
) -> None:
    sha256 = blobs.put(source).sha256
    state = source.stat()
    with source.open("r+b") as file:
        file.write(b"x")
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(IntegrityError):
        Blobs(folder=tmp_path / "blobs").check(sha256)


def test_a_missing_blob_is_named(blobs: Blobs) -> None:
    with pytest.raises(IntegrityError, match="missing"):
        blobs.read("ab" * 32, 0, 1)


@pytest.mark.parametrize(
    "name", ["", "ab", "../state.db", "/etc/passwd", "AB" * 32, "ab" * 32 + "\n", "a" * 65]
)
def test_only_a_sha256_names_a_blob(blobs: Blobs, name: str) -> None:
    with pytest.raises(InvalidInputError):
        blobs.read(name, 0, 1)


def test_what_a_crash_left_is_deleted_at_the_next_start(blobs: Blobs, tmp_path: Path) -> None:
    blobs.temporary().write_bytes(b"half")
    Blobs(folder=tmp_path / "blobs")
    assert list((tmp_path / "blobs").iterdir()) == []


def test_a_source_that_cannot_be_read_is_a_storage_error(blobs: Blobs, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing\.bin"):
        blobs.put(tmp_path / "nothing.bin")
