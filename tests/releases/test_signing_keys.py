"""The key that signs releases."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloud.releases.keys import PRIVATE, PUBLIC, open_keys
from edge.student.bundle import BundleFile, digest_of
from edge.update import trust
from protos.errors import IntegrityError, InvalidInputError, SignatureError, StorageError
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("graph.onnx", "weights.bin", "tokenizer.json", "student.json", "harness.json")


def manifest(channel: str = "home") -> bytes:
    files = [BundleFile(name, "ab" * 32, 5) for name in NAMES]
    return release_pb2.Manifest(
        channel=channel,
        version=1,
        student=digest_of(files),
        files=[release_pb2.File(name=f.name, sha256=f.sha256, size=f.size) for f in files],
        expires_ms=1,
    ).SerializeToString()


def test_the_first_start_makes_a_key_that_only_its_owner_can_read(tmp_path: Path) -> None:
    open_keys(tmp_path / "keys")
    assert stat.S_IMODE((tmp_path / "keys" / PRIVATE).stat().st_mode) == 0o600
    assert sorted(p.name for p in (tmp_path / "keys").iterdir()) == [PRIVATE, PUBLIC]


def test_devices_that_trust_the_public_file_believe_what_any_later_start_signs(
    tmp_path: Path,
) -> None:
    first = open_keys(tmp_path)
    signed = open_keys(tmp_path).sign(manifest())
    keys = trust.load_trusted(tmp_path / PUBLIC)
    assert trust.verify(signed, keys=keys, channel="home", now_ms=0).version == 1
    assert first.verify(signed, channel="home").version == 1, "expired, but ours"


def test_another_channel_or_damage_is_not_verified(tmp_path: Path) -> None:
    signer = open_keys(tmp_path)
    signed = signer.sign(manifest())
    for bad, channel in ((signed, "office"), (signed[:-1], "home"), (b"", "home")):
        with pytest.raises(SignatureError):
            signer.verify(bad, channel=channel)


def test_a_start_that_died_between_the_two_files_is_finished_by_the_next(tmp_path: Path) -> None:
    open_keys(tmp_path)
    public = (tmp_path / PUBLIC).read_bytes()
    (tmp_path / PUBLIC).unlink()
    (tmp_path / f"{PRIVATE}.tmp").write_bytes(b"half")
    open_keys(tmp_path)
    assert (tmp_path / PUBLIC).read_bytes() == public


def test_a_start_that_died_while_writing_the_private_key_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / f"{PRIVATE}.tmp").write_bytes(b"half")
    open_keys(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [PRIVATE, PUBLIC]


def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    open_keys(tmp_path)
    (tmp_path / PRIVATE).chmod(0o640)
    with pytest.raises(InvalidInputError, match=r"0640.*chmod 600"):
        open_keys(tmp_path)


def test_a_lost_private_key_is_never_replaced_in_silence(tmp_path: Path) -> None:
    open_keys(tmp_path)
    (tmp_path / PRIVATE).unlink()
    with pytest.raises(InvalidInputError, match="restore the private key"):
        open_keys(tmp_path)


def test_a_damaged_private_key_is_named(tmp_path: Path) -> None:
    open_keys(tmp_path)
    (tmp_path / PRIVATE).write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n")
    with pytest.raises(IntegrityError, match=PRIVATE):
        open_keys(tmp_path)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    open_keys(tmp_path)
    pem = X25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    (tmp_path / PRIVATE).write_bytes(pem)
    with pytest.raises(InvalidInputError, match="not ed25519"):
        open_keys(tmp_path)


def test_a_public_key_that_is_damaged_or_anothers_is_refused(tmp_path: Path) -> None:
    open_keys(tmp_path / "a")
    open_keys(tmp_path / "b")
    (tmp_path / "a" / PUBLIC).write_bytes((tmp_path / "b" / PUBLIC).read_bytes())
    with pytest.raises(IntegrityError, match="restore the pair"):
        open_keys(tmp_path / "a")
    (tmp_path / "a" / PUBLIC).write_bytes(b"no key")
    with pytest.raises(IntegrityError, match="delete it"):
        open_keys(tmp_path / "a")


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"a file where the folder should be")
    with pytest.raises(StorageError, match="keys"):
        open_keys(tmp_path / "keys")
