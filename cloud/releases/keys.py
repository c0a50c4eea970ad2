"""Who signs releases: one ed25519 key in the cloud's state folder.

``signing.pem`` is the private key, readable by its owner only; ``trusted.pem`` is the public key
that devices get as ``--trust``. :class:`Signer` is what the store depends on: a seam for the TUF
repository, whose keys live elsewhere.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Protocol

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from edge.delta.files import TEMPORARY, fsync_folder, storage_errors, write_atomic
from edge.update import trust
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

    from protos.v1 import release_pb2

PRIVATE = "signing.pem"
PUBLIC = "trusted.pem"


class Signer(Protocol):
    """Signs manifests, and knows its own signatures again."""

    def sign(self, manifest: bytes) -> bytes:
        """A serialized ``SignedManifest`` of these exact bytes.

        Raises:
            InvalidInputError: it is bigger than any device accepts.
        """
        ...

    def verify(self, signed: bytes, *, channel: str) -> release_pb2.Manifest:
        """The manifest inside, whether expired or not.

        Raises:
            SignatureError: it is damaged, or was not signed here for this channel.
        """
        ...


class KeySigner:
    """Signs with one ed25519 key."""

    def __init__(self, *, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._trusted = {trust.key_id(key.public_key()): key.public_key()}

    def sign(self, manifest: bytes) -> bytes:
        """See :class:`Signer`."""
        return trust.sign_manifest(manifest, self._key)

    def verify(self, signed: bytes, *, channel: str) -> release_pb2.Manifest:
        """See :class:`Signer`."""
        # At the epoch nothing has expired yet; whether it has is for devices to judge.
        return trust.verify(signed, keys=self._trusted, channel=channel, now_ms=0)


def open_keys(folder: Path) -> KeySigner:
    """Load the key in ``folder``, or make one if there has never been any.

    Raises:
        InvalidInputError: others may read the private key, or it is gone or of another kind.
        IntegrityError: a key file is damaged, or the two do not belong together.
        StorageError: a file cannot be read or written.
    """
    private, public = folder / PRIVATE, folder / PUBLIC
    with storage_errors(f"opening the signing key in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        if not private.exists():
            if public.exists():
                # A new key would be made in silence, and no device would believe it.
                msg = (
                    f"{private} is gone, but {public} is there: restore the private key from a "
                    "backup; else start with a new state folder, whose trusted.pem every device "
                    "then needs as its --trust file"
                )
                raise InvalidInputError(msg)
            _write_private(private, Ed25519PrivateKey.generate())
        key = _load_private(private)
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        if not public.exists():
            write_atomic(public, pem)
    _check_public(public, key)
    return KeySigner(key=key)


def _write_private(path: Path, key: Ed25519PrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    temporary = path.with_name(path.name + TEMPORARY)
    temporary.unlink(missing_ok=True)
    # Private from its first moment on: a chmod afterwards would leave a gap.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)
    fsync_folder(path.parent)


def _load_private(path: Path) -> Ed25519PrivateKey:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        msg = f"{path} has mode {mode:04o}, others may read it: chmod 600 it"
        raise InvalidInputError(msg)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        msg = f"{path} holds no private key that can be read ({error}): restore it from a backup"
        raise IntegrityError(msg) from error
    if not isinstance(key, Ed25519PrivateKey):
        msg = f"{path} holds a key that is not ed25519: restore the right one from a backup"
        raise InvalidInputError(msg)
    return key


def _check_public(path: Path, key: Ed25519PrivateKey) -> None:
    try:
        trusted = trust.load_trusted(path)
    except InvalidInputError as error:
        msg = f"{path} is damaged ({error}): delete it, and it is made again from {PRIVATE}"
        raise IntegrityError(msg) from error
    if trust.key_id(key.public_key()) not in trusted:
        msg = (
            f"{path} is not the public key of {PRIVATE} beside it: restore the pair from a backup. "
            "Devices that trust the one refuse what the other signs"
        )
        raise IntegrityError(msg)
