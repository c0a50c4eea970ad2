"""Private keys in PEM files that nobody else may read."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from edge.delta.files import storage_errors
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
    from cryptography.x509 import Certificate


def new_key() -> EllipticCurvePrivateKey:
    """A new P-256 key, by the system's randomness."""
    return generate_private_key(SECP256R1())


def private_pem(key: PrivateKeyTypes) -> bytes:
    """The key as PEM, PKCS #8, without a password: who may read the file may use the key."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pair_pem(key: EllipticCurvePrivateKey, certificate: Certificate) -> bytes:
    """Key and certificate for one file (PEM), so that they change together."""
    return private_pem(key) + certificate.public_bytes(Encoding.PEM)


def load_private(path: Path) -> PrivateKeyTypes:
    """Load a private key of whatever kind.

    Raises:
        InvalidInputError: others may read it.
        IntegrityError: there is no key in the file.
        StorageError: the file cannot be read.
    """
    with storage_errors(f"reading the key in {path}"):
        mode = stat.S_IMODE(path.stat().st_mode)
        pem = path.read_bytes()
    if mode & 0o077:
        msg = f"{path} has mode {mode:04o}, others may read it: chmod 600 it"
        raise InvalidInputError(msg)
    try:
        return load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        msg = f"{path} holds no private key that can be read ({error}): restore it from a backup"
        raise IntegrityError(msg) from error


def load_key(path: Path) -> EllipticCurvePrivateKey:
    """Load a P-256 key.

    Raises:
        InvalidInputError: it is another kind of key, or others may read it.
        IntegrityError: there is no key in the file.
        StorageError: the file cannot be read.
    """
    key = load_private(path)
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        msg = f"{path} holds a key that is not a P-256 key: restore the right one from a backup"
        raise InvalidInputError(msg)
    return key
