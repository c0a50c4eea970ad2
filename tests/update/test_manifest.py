"""What a manifest must be beyond its signature, and the copy on the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.student.bundle import FILES, BundleFile, digest_of
from edge.update.manifest import MAX_MANIFEST_BYTES, ManifestFile, parse
from protos.errors import IntegrityError, SignatureError
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from pathlib import Path


def manifest(**changes: object) -> release_pb2.Manifest:
    files = [BundleFile(name, f"{n:064x}", n) for n, name in enumerate(FILES)]
    right: dict[str, Any] = {
        "channel": "home",
        "version": 3,
        "student": digest_of(files),
        "files": [release_pb2.File(name=f.name, sha256=f.sha256, size=f.size) for f in files],
    }
    return release_pb2.Manifest(**{**right, **changes})


def read(data: bytes) -> release_pb2.Manifest:
    return parse(data, channel="home", release=3)


def test_a_manifest_is_read_as_it_was_written() -> None:
    assert read(manifest().SerializeToString()) == manifest()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"channel": "garden"}, "channel 'garden'"),
        ({"version": 2}, "of release 3 says that it is of 2"),
        ({"version": 0}, "of release 3"),
        ({"student": "0" * 64}, "its files do not make"),
        ({"files": []}, "lists other files"),
        ({"deltas": [release_pb2.Delta(base_sha256="../x")]}, "64 lower-case hex"),
        ({"files": [release_pb2.File(name=n, sha256="../x") for n in FILES]}, "64 lower-case"),
        (
            {"files": [release_pb2.File(name=n, sha256="0" * 64, size=1 << 60) for n in FILES]},
            "more than",
        ),
    ],
)
def test_what_is_signed_but_not_for_this_device_is_refused(
    changes: dict[str, object], why: str
) -> None:
    with pytest.raises(SignatureError, match=why):
        read(manifest(**changes).SerializeToString())


def test_a_file_listed_twice_is_refused() -> None:
    twice = manifest()
    twice.files.append(twice.files[0])
    with pytest.raises(SignatureError):
        read(twice.SerializeToString())


def test_release_zero_is_none() -> None:
    with pytest.raises(SignatureError):
        parse(manifest(version=0).SerializeToString(), channel="home", release=0)


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(SignatureError):
        read(data)


def test_too_much_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(SignatureError, match="at most"):
        read(bytes(MAX_MANIFEST_BYTES + 1))


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_copy_with_a_flipped_bit_is_not_used(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "manifest"
    file = ManifestFile(path)
    file.write(manifest().SerializeToString())
    assert file.read() == manifest().SerializeToString()
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="fetched again"):
        file.read()


def test_no_copy_is_no_manifest(tmp_path: Path) -> None:
    file = ManifestFile(tmp_path / "manifest")
    file.delete()
    with pytest.raises(IntegrityError):
        file.read()
