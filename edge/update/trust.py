"""Which manifests a device believes.

A manifest is signed with ed25519 over a context prefix and its exact bytes. It is parsed only after
a signature by a pinned key was found right. :class:`TrustedReleases` is what the update client
depends on: a seam for the TUF repository.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, NoReturn, Protocol

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from google.protobuf.message import DecodeError

from edge.delta.files import storage_errors
from edge.student.bundle import BundleFile, digest_of
from protos.errors import InvalidInputError, SignatureError
from protos.v1 import release_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CONTEXT = b"anabranch-manifest-v1\0"
"""Goes before the signed bytes: a signature of something else is never one of a manifest."""

MAX_SIGNED_BYTES = 3 << 20
"""Of a signed manifest: below gRPC's default message limit of 4 MiB."""

MAX_SIGNATURES = 16
MAX_FILE_BYTES = 1 << 40

_HEX = re.compile(r"[0-9a-f]{64}")
_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


class TrustedReleases(Protocol):
    """Decides which manifests are to be believed."""

    def manifest(self, signed: bytes, *, now_ms: int) -> release_pb2.Manifest:
        """The manifest inside ``signed`` if it is trusted at ``now_ms`` (since the epoch).

        Raises:
            SignatureError: there is any doubt.
        """
        ...


class PinnedKeys:
    """Trust in keys that came with the device (``anabranch edge --trust FILE``)."""

    def __init__(self, *, keys: Mapping[str, Ed25519PublicKey], channel: str) -> None:
        self._keys = dict(keys)
        self._channel = channel

    def manifest(self, signed: bytes, *, now_ms: int) -> release_pb2.Manifest:
        """See :class:`TrustedReleases`."""
        return verify(signed, keys=self._keys, channel=self._channel, now_ms=now_ms)


def key_id(public_key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key, lower-case hex."""
    return hashlib.sha256(public_key.public_bytes_raw()).hexdigest()


def load_trusted(path: Path) -> dict[str, Ed25519PublicKey]:
    """The ed25519 public keys in a PEM file, by key id.

    Raises:
        InvalidInputError: there is none, or one is malformed or of another kind.
        StorageError: the file cannot be read.
    """
    if not path.exists():
        msg = f"{path} is not there: copy the cloud's keys/trusted.pem to it"
        raise InvalidInputError(msg)
    with storage_errors(f"reading the trusted keys in {path}"):
        blocks = _PEM.findall(path.read_bytes())
    keys: dict[str, Ed25519PublicKey] = {}
    for block in blocks:
        try:
            key = load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm) as error:
            msg = f"{path}: a public key is malformed ({error}); copy the cloud's trusted.pem again"
            raise InvalidInputError(msg) from error
        if not isinstance(key, Ed25519PublicKey):
            msg = f"{path}: holds a key that is not ed25519; copy the cloud's trusted.pem again"
            raise InvalidInputError(msg)
        keys[key_id(key)] = key
    if not keys:
        msg = f"{path}: holds no public key in PEM form; copy the cloud's keys/trusted.pem there"
        raise InvalidInputError(msg)
    return keys


def sign_manifest(manifest_bytes: bytes, private_key: Ed25519PrivateKey) -> bytes:
    """Serialized ``SignedManifest`` of these exact bytes.

    Raises:
        InvalidInputError: it is bigger than any device accepts.
    """
    signature = release_pb2.Signature(
        key_id=key_id(private_key.public_key()),
        signature=private_key.sign(CONTEXT + manifest_bytes),
    )
    signed = release_pb2.SignedManifest(manifest=manifest_bytes, signatures=[signature])
    data = signed.SerializeToString()
    if len(data) > MAX_SIGNED_BYTES:
        msg = (
            f"the manifest has {len(data)} bytes signed, devices accept {MAX_SIGNED_BYTES}: "
            "list fewer demonstrations or canaries"
        )
        raise InvalidInputError(msg)
    return data


def verify(
    signed: bytes, *, keys: Mapping[str, Ed25519PublicKey], channel: str, now_ms: int
) -> release_pb2.Manifest:
    """The manifest inside ``signed`` (a serialized ``SignedManifest``), if it can be trusted.

    Args:
        signed: what the cloud sent.
        keys: trusted public keys by key id.
        channel: the device's own channel; a manifest of another one is refused.
        now_ms: milliseconds since the epoch.

    Raises:
        SignatureError: it is malformed, not signed by a trusted key, of another channel, expired,
            or does not describe a whole student.
    """
    if len(signed) > MAX_SIGNED_BYTES:
        _refuse(f"has {len(signed)} bytes, at most {MAX_SIGNED_BYTES} are read")
    envelope = release_pb2.SignedManifest()
    try:
        envelope.ParseFromString(signed)
    except DecodeError:
        _refuse("is no SignedManifest")
    if len(envelope.signatures) > MAX_SIGNATURES:
        _refuse(f"has more than {MAX_SIGNATURES} signatures")
    if not any(_is_right(s, envelope.manifest, keys) for s in envelope.signatures):
        _refuse("has no right signature by a trusted key; check the device's --trust file")
    manifest = release_pb2.Manifest()
    try:
        manifest.ParseFromString(envelope.manifest)
    except DecodeError:
        _refuse("is signed, but no Manifest")
    _check(manifest, channel=channel, now_ms=now_ms)
    return manifest


def _is_right(
    signature: release_pb2.Signature, manifest: bytes, keys: Mapping[str, Ed25519PublicKey]
) -> bool:
    key = keys.get(signature.key_id)
    if key is None:
        return False
    try:
        key.verify(signature.signature, CONTEXT + manifest)
    except InvalidSignature:
        return False
    return True


def _check(manifest: release_pb2.Manifest, *, channel: str, now_ms: int) -> None:
    """Refuse what is signed but not for this device, not any more, or not a whole student."""
    if manifest.channel != channel:
        _refuse(f"is for channel {manifest.channel!r}, this device is in {channel!r}")
    if manifest.expires_ms and manifest.expires_ms <= now_ms:
        _refuse(f"expired {(now_ms - manifest.expires_ms) / 1000:.0f} s ago; check the clock")
    if manifest.version < 1:
        _refuse("has version 0")
    sums = [
        *(f.sha256 for f in manifest.files),
        *(s for d in manifest.deltas for s in (d.base_sha256, d.target_sha256, d.sha256)),
    ]
    if not all(_HEX.fullmatch(s) for s in sums):
        _refuse("has a SHA-256 that is not 64 lower-case hex digits")
    sizes = [*(f.size for f in manifest.files), *(d.size for d in manifest.deltas)]
    if any(size > MAX_FILE_BYTES for size in sizes):
        _refuse(f"has a file of more than {MAX_FILE_BYTES} bytes")
    try:
        student = digest_of(BundleFile(f.name, f.sha256, f.size) for f in manifest.files)
    except InvalidInputError as error:
        _refuse(f"lists other files: {error}")
    if len(manifest.files) != len({f.name for f in manifest.files}) or student != manifest.student:
        _refuse("names a student that its files do not make")


def _refuse(what: str) -> NoReturn:
    msg = f"the release manifest {what}; it is not used, the old student serves on"
    raise SignatureError(msg)
