"""A device's identity on its disk: one folder.

``identity.pem``
    the private key and the certificate in one file, so that they change together; mode 600.
``ca.pem``
    the authorities whose servers are believed.
``pending.key``
    the key of an enrolment that has had no answer yet: the same key asks again after a power cut,
    and the cloud gives the same certificate to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from edge.delta.files import storage_errors, write_atomic
from edge.identity.keys import load_key, new_key, pair_pem, private_pem
from protos.errors import IntegrityError, InvalidInputError
from protos.identity import device_of, device_uri

if TYPE_CHECKING:
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

IDENTITY = "identity.pem"
AUTHORITIES = "ca.pem"
PENDING = "pending.key"
_MAX_CERTIFICATE = 16 * 1024


@dataclass(frozen=True)
class Identity:
    """Who a device is.

    Attributes:
        folder: where it lies.
        device: its name, out of the certificate.
        key: the private key.
        certificate: the newest one.
        authorities: PEM of those who sign servers.
    """

    folder: Path
    device: str
    key: EllipticCurvePrivateKey = field(compare=False)  # the certificate holds its public half
    certificate: x509.Certificate
    authorities: bytes

    @property
    def not_before(self) -> float:
        """Seconds since 1970."""
        return self.certificate.not_valid_before_utc.timestamp()

    @property
    def not_after(self) -> float:
        """Seconds since 1970."""
        return self.certificate.not_valid_after_utc.timestamp()

    @property
    def key_pem(self) -> bytes:
        """The private key, PEM."""
        return private_pem(self.key)

    @property
    def certificate_pem(self) -> bytes:
        """The certificate, PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def file(self) -> Path:
        """Key and certificate in one PEM file."""
        return self.folder / IDENTITY


def load_identity(folder: Path) -> Identity:
    """Read a device's identity.

    Raises:
        InvalidInputError: the device is not enrolled, or the files do not fit.
        IntegrityError: a file is damaged.
        StorageError: a file cannot be read.
    """
    file, authorities = folder / IDENTITY, folder / AUTHORITIES
    for path in (file, authorities):
        if not path.exists():
            msg = f"{path} is not there: enrol this device with `anabranch device enroll`"
            raise InvalidInputError(msg)
    key = load_key(file)
    with storage_errors(f"reading {folder}"):
        pem, trusted = file.read_bytes(), authorities.read_bytes()
    check_authorities(trusted, str(authorities))
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        msg = f"{file} holds no certificate ({error}): enrol this device again"
        raise IntegrityError(msg) from error
    if certificate.public_key() != key.public_key():
        msg = f"{file} holds a certificate of another key: enrol this device again"
        raise IntegrityError(msg)
    return Identity(folder, device_of(certificate), key, certificate, trusted)


def store_identity(
    folder: Path, *, key: EllipticCurvePrivateKey, certificate: bytes, authorities: bytes
) -> Identity:
    """Put a certificate (DER) that the cloud has given into force, if it is for this key.

    Raises:
        IntegrityError: it is not what was asked for; nothing is changed.
        StorageError: the disk is full or failed; nothing is changed.
    """
    if len(certificate) > _MAX_CERTIFICATE:
        msg = f"the cloud gave a certificate of {len(certificate)} bytes: that cannot be one"
        raise IntegrityError(msg)
    try:
        given = x509.load_der_x509_certificate(certificate)
        device = device_of(given)
    except (ValueError, InvalidInputError) as error:
        msg = f"the cloud gave no certificate of a device: {error}"
        raise IntegrityError(msg) from error
    if given.public_key() != key.public_key():
        msg = "the cloud gave a certificate for another key"
        raise IntegrityError(msg)
    if not any(_signed(given, each) for each in x509.load_pem_x509_certificates(authorities)):
        msg = "the cloud gave a certificate that its own authority (ca.pem) did not sign"
        raise IntegrityError(msg)
    write_atomic(folder / AUTHORITIES, authorities, mode=0o644)
    write_atomic(folder / IDENTITY, pair_pem(key, given), mode=0o600)
    return Identity(folder, device, key, given, authorities)


def pending_key(folder: Path) -> EllipticCurvePrivateKey:
    """The key of the enrolment under way; a new one where none is.

    Raises:
        StorageError: the disk is full or failed.
        IntegrityError: the file is damaged.
    """
    with storage_errors(f"making {folder}"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / PENDING
    if not path.exists():
        write_atomic(path, private_pem(new_key()), mode=0o600)
    return load_key(path)


def request(key: EllipticCurvePrivateKey, *, device: str | None) -> bytes:
    """A certificate request (PKCS #10, DER), for a device or for whomever the token names."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if device is not None:
        names = [x509.UniformResourceIdentifier(device_uri(device))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, SHA256()).public_bytes(Encoding.DER)


def check_authorities(pem: bytes, where: str) -> None:
    """Raise :class:`InvalidInputError` unless ``pem`` holds certificates.

    Args:
        pem: the file's content.
        where: its name, for the message.
    """
    try:
        x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        msg = f"{where} holds no certificate ({error}): copy the cloud's ca.pem to it"
        raise InvalidInputError(msg) from error


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # noqa: BLE001 # each way not to be signed has an error of its own
        return False
    return True
