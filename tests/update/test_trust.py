"""Which manifests a device believes, and which not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from edge.student.bundle import FILES, BundleFile, digest_of
from edge.update import trust
from protos.errors import InvalidInputError, SignatureError
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from pathlib import Path

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
KEYS = {trust.key_id(KEY.public_key()): KEY.public_key()}
NOW_MS = 1_000_000


def manifest(**changes: object) -> release_pb2.Manifest:
    files = [BundleFile(name, f"{n:064x}", n) for n, name in enumerate(FILES)]
    right: dict[str, Any] = {
        "channel": "home",
        "version": 3,
        "student": digest_of(files),
        "files": [release_pb2.File(name=f.name, sha256=f.sha256, size=f.size) for f in files],
    }
    return release_pb2.Manifest(**{**right, **changes})


def sign(m: release_pb2.Manifest, key: Ed25519PrivateKey = KEY) -> bytes:
    return trust.sign_manifest(m.SerializeToString(), key)


def verify(signed: bytes) -> release_pb2.Manifest:
    return trust.verify(signed, keys=KEYS, channel="home", now_ms=NOW_MS)


def pem(key: Ed25519PublicKey | EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_a_signed_manifest_is_believed_byte_for_byte() -> None:
    right = manifest(expires_ms=NOW_MS + 1)
    assert verify(sign(right)) == right


def test_one_trusted_signature_among_others_is_enough() -> None:
    envelope = release_pb2.SignedManifest.FromString(sign(manifest(), OTHER))
    envelope.signatures.extend(release_pb2.SignedManifest.FromString(sign(manifest())).signatures)
    assert verify(envelope.SerializeToString()).version == 3


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"channel": "garden"}, "channel 'garden'"),
        ({"expires_ms": NOW_MS}, "expired"),
        ({"version": 0}, "version 0"),
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
        verify(sign(manifest(**changes)))


def test_a_file_listed_twice_is_refused() -> None:
    twice = manifest()
    twice.files.append(twice.files[0])
    with pytest.raises(SignatureError):
        verify(sign(twice))


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(SignatureError, match="trusted key"):
        verify(sign(manifest(), OTHER))


def test_a_signature_under_a_trusted_keys_name_is_refused() -> None:
    envelope = release_pb2.SignedManifest.FromString(sign(manifest(), OTHER))
    envelope.signatures[0].key_id = trust.key_id(KEY.public_key())
    with pytest.raises(SignatureError, match="trusted key"):
        verify(envelope.SerializeToString())


def test_a_signature_without_the_context_prefix_is_refused() -> None:
    envelope = release_pb2.SignedManifest.FromString(sign(manifest()))
    envelope.signatures[0].signature = KEY.sign(envelope.manifest)
    with pytest.raises(SignatureError, match="trusted key"):
        verify(envelope.SerializeToString())


def test_signed_bytes_that_are_no_manifest_are_refused() -> None:
    with pytest.raises(SignatureError, match="no Manifest"):
        verify(trust.sign_manifest(b"\xff", KEY))


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_never_believed_as_something_else(place: int, bit: int) -> None:
    signed = bytearray(sign(manifest()))
    signed[place % len(signed)] ^= 1 << bit
    with pytest.raises(SignatureError):
        verify(bytes(signed))


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(SignatureError):
        verify(data)


def test_too_much_is_refused_at_both_ends() -> None:
    huge = manifest(learned_from=["x" * 1000] * (trust.MAX_SIGNED_BYTES // 1000))
    with pytest.raises(InvalidInputError, match="fewer demonstrations"):
        sign(huge)
    with pytest.raises(SignatureError, match="at most"):
        verify(bytes(trust.MAX_SIGNED_BYTES + 1))
    many = release_pb2.SignedManifest.FromString(sign(manifest()))
    many.signatures.extend([many.signatures[0]] * trust.MAX_SIGNATURES)
    with pytest.raises(SignatureError, match="signatures"):
        verify(many.SerializeToString())


def test_every_key_of_a_trust_file_is_trusted(tmp_path: Path) -> None:
    file = tmp_path / "trusted.pem"
    file.write_bytes(b"# ours\n" + pem(KEY.public_key()) + pem(OTHER.public_key()))
    keys = trust.load_trusted(file)
    assert set(keys) == {trust.key_id(k.public_key()) for k in (KEY, OTHER)}
    pinned = trust.PinnedKeys(keys=keys, channel="home")
    assert pinned.manifest(sign(manifest(), OTHER), now_ms=NOW_MS).version == 3
    assert all(isinstance(k, Ed25519PublicKey) for k in keys.values())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "malformed"),
        (pem(generate_private_key(SECP256R1()).public_key()), "not ed25519"),
    ],
)
def test_a_bad_trust_file_says_what_to_do(tmp_path: Path, content: bytes, why: str) -> None:
    file = tmp_path / "trusted.pem"
    file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=why):
        trust.load_trusted(file)
    with pytest.raises(InvalidInputError, match="is not there: copy"):
        trust.load_trusted(tmp_path / "absent.pem")
