"""Reads certificate requests (PKCS #10): pure checks."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from protos.errors import InvalidInputError, RefusedError
from protos.identity import device_of

MAX_REQUEST = 8 * 1024
"""Bytes; a request for a P-256 key takes some 300."""


class Request(NamedTuple):
    """A public key whose holder asks for a certificate; ``fingerprint`` is the key's SHA-256."""

    key: EllipticCurvePublicKey
    fingerprint: str


def read_request(der: bytes, *, device: str) -> Request:
    """Understand a request for a certificate of ``device``.

    Raises:
        InvalidInputError: it is malformed, not signed by its own key, or the key is of another
            kind than P-256.
        RefusedError: it asks for another device's certificate.
    """
    if len(der) > MAX_REQUEST:
        msg = f"the certificate request has {len(der)} bytes; the limit is {MAX_REQUEST}"
        raise InvalidInputError(msg)
    try:
        request = x509.load_der_x509_csr(der)
        key = request.public_key()
        proven = request.is_signature_valid
        asked = device_of(request) if list(request.extensions) else device
    except (ValueError, UnsupportedAlgorithm) as error:
        msg = f"this is no certificate request that can be read: {error}"
        raise InvalidInputError(msg) from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        msg = "the certificate request is for a key of another kind than P-256"
        raise InvalidInputError(msg)
    if not proven:
        msg = "the certificate request is not signed by its own key"
        raise InvalidInputError(msg)
    if asked != device:
        msg = f"the certificate request is for device {asked!r}, and who asks is {device!r}"
        raise RefusedError(msg)
    return Request(key, fingerprint(key))


def fingerprint(key: EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo, DER), in hexadecimal digits."""
    raw = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(raw).hexdigest()
