"""Private keys of the TUF roles: one ed25519 key a PEM file, readable by its owner only.

A key is known by its id, not by its file's name. What lies in the cloud's ``keys/`` can sign there;
a key that is moved elsewhere cannot any more, and nothing else has to be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey

from edge.delta.files import storage_errors, write_atomic
from edge.identity.keys import load_private, private_pem
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

PRIVATE, PUBLIC = ".pem", ".pub"


def make(path: Path) -> CryptoSigner:
    """Make a key: the private half in ``path``, the public half beside it as ``.pub``.

    Raises:
        InvalidInputError: the file exists, or its name does not end in ``.pem``.
        StorageError: a file cannot be written.
    """
    if path.suffix != PRIVATE:
        msg = f"{path} does not end in {PRIVATE}: name the private key's file NAME{PRIVATE}"
        raise InvalidInputError(msg)
    if path.exists():
        msg = f"{path} exists: a key is never overwritten; choose another name"
        raise InvalidInputError(msg)
    key = Ed25519PrivateKey.generate()
    with storage_errors(f"writing a key to {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, private_pem(key), mode=0o600)
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_atomic(path.with_suffix(PUBLIC), pem)
    return CryptoSigner(key)


def load(path: Path) -> CryptoSigner:
    """The signer whose private key is in a file.

    Raises:
        InvalidInputError: it is not there, others may read it, or it is of another kind.
        IntegrityError: it is damaged.
        StorageError: it cannot be read.
    """
    if not path.exists():
        msg = f"{path} is not there: give the file of a private key, or bring it back"
        raise InvalidInputError(msg)
    key = load_private(path)
    if not isinstance(key, Ed25519PrivateKey):
        msg = f"{path} holds a key that is not ed25519: restore the right one from a backup"
        raise InvalidInputError(msg)
    return CryptoSigner(key)


def load_public(path: Path) -> SSlibKey:
    """The public key in a file, as :func:`make` writes it.

    Raises:
        InvalidInputError: it is not there, or no ed25519 public key.
        StorageError: it cannot be read.
    """
    if not path.exists():
        msg = f"{path} is not there: give the {PUBLIC} file that `anabranch keys new` made"
        raise InvalidInputError(msg)
    with storage_errors(f"reading the key in {path}"):
        data = path.read_bytes()
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        msg = f"{path} holds no public key that can be read ({error})"
        raise InvalidInputError(msg) from error
    if not isinstance(key, Ed25519PublicKey):
        msg = f"{path} holds a key that is not ed25519"
        raise InvalidInputError(msg)
    return SSlibKey.from_crypto(key)


def signers(folder: Path) -> dict[str, CryptoSigner]:
    """Every key in a folder, by its id.

    Raises:
        InvalidInputError: others may read one, or it is of another kind.
        IntegrityError: one is damaged.
        StorageError: one cannot be read.
    """
    found = (load(path) for path in sorted(folder.glob(f"*{PRIVATE}")))
    return {signer.public_key.keyid: signer for signer in found}
