"""The certificate authority of one cloud: a P-256 key that signs, and nothing else.

It signs certificates of devices (client), of the cloud's own servers and of the broker (server),
and of the cloud towards the broker (client). The extended key usage keeps them apart: no device can
be taken for a server. P-256 and not ed25519: gRPC's TLS library does not offer ed25519 by default.

Source: RFC 5280 for the extensions.
"""

from __future__ import annotations

import fcntl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud.identity.request import fingerprint
from edge.delta.files import storage_errors, write_atomic
from edge.identity.keys import load_key, new_key, private_pem
from protos.errors import IntegrityError, InvalidInputError
from protos.identity import CLOUD_NAME, CLOUD_URI, device_uri

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric import ec

KEY = "ca.key"
CERTIFICATE = "ca.pem"
_AUTHORITY_LIFE = timedelta(days=30 * 365)
SERVER_LIFE = timedelta(days=90)
RENEWABLE = 2 / 3
"""The share of its life after which a certificate makes room for another."""
_BEFORE = timedelta(hours=1)
"""Certificates begin so long before they are made: clocks of devices differ."""


class Authority:
    """Signs with one key. Whether it should, others have decided."""

    def __init__(self, *, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate = certificate
        self.pem = certificate.public_bytes(Encoding.PEM)

    def device(
        self, device: str, key: ec.EllipticCurvePublicKey, *, now: float, life_s: float
    ) -> x509.Certificate:
        """A device's certificate; it ends ``life_s`` seconds after ``now`` (since 1970)."""
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(device_uri(device))]
        life = timedelta(seconds=life_s)
        return self._sign(device, names, key, ExtendedKeyUsageOID.CLIENT_AUTH, now, life)

    def cloud(self, key: ec.EllipticCurvePublicKey, *, now: float) -> x509.Certificate:
        """What the cloud shows to the broker."""
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(CLOUD_URI)]
        usage = ExtendedKeyUsageOID.CLIENT_AUTH
        return self._sign(CLOUD_NAME, names, key, usage, now, SERVER_LIFE)

    def server(
        self, hosts: Iterable[str], key: ec.EllipticCurvePublicKey, *, now: float
    ) -> x509.Certificate:
        """A server's certificate, for the names and addresses that clients connect to.

        Raises:
            InvalidInputError: no host, or one that is neither a name nor an address.
        """
        names = host_names(hosts)
        usage = ExtendedKeyUsageOID.SERVER_AUTH
        return self._sign("anabranch server", names, key, usage, now, SERVER_LIFE)

    def revocations(self, revoked: Iterable[tuple[int, float]], *, now: float) -> bytes:
        """A revocation list (CRL, PEM) of serial numbers and times (seconds since 1970).

        It ends with the authority: a broker that reads it from a file must not refuse everybody
        because the cloud was away for long.
        """
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(_time(now) - _BEFORE)
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(int(now * 1000)), critical=False)
        )
        for serial, at in revoked:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder()
                .serial_number(serial)
                .revocation_date(_time(at))
                .build()
            )
        return builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM)

    def lasting(self, path: Path, *, now: float) -> x509.Certificate | None:
        """The certificate in a PEM file, if this authority signed it and another is not due yet.

        Raises:
            StorageError: the file cannot be read.
        """
        with storage_errors(f"reading {path}"):
            pem = path.read_bytes() if path.exists() else b""
        try:
            there = x509.load_pem_x509_certificate(pem)
        except ValueError:
            return None
        begin = there.not_valid_before_utc.timestamp()
        due = begin + RENEWABLE * (there.not_valid_after_utc.timestamp() - begin)
        return there if there.issuer == self.certificate.subject and now < due else None

    def _sign(
        self,
        name: str,
        names: list[x509.GeneralName],
        key: ec.EllipticCurvePublicKey,
        usage: x509.ObjectIdentifier,
        now: float,
        life: timedelta,
    ) -> x509.Certificate:
        begin = _time(now)
        return (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin - _BEFORE)
            .not_valid_after(begin + life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, SHA256())
        )


def host_names(hosts: Iterable[str]) -> list[x509.GeneralName]:
    """Hosts as a certificate holds them, each once.

    Raises:
        InvalidInputError: no host, or one that is neither a name nor an address.
    """
    names = [_host(host) for host in dict.fromkeys(hosts)]
    if not names:
        msg = "a server needs a name that devices reach it by: give --tls-name"
        raise InvalidInputError(msg)
    return names


def open_authority(folder: Path, *, now: float) -> Authority:
    """Load the authority in ``folder``, or make one if there has never been any.

    Args:
        folder: of ``ca.key`` and ``ca.pem``.
        now: seconds since 1970; a new authority begins then.

    Raises:
        InvalidInputError: others may read the key, or it is gone while its certificate is there.
        IntegrityError: a file is damaged, or the two do not belong together.
        StorageError: a file cannot be read or written.
    """
    private, public = folder / KEY, folder / CERTIFICATE
    with storage_errors(f"opening the certificate authority in {folder}"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a command and the cloud may both be the first
            if not private.exists():
                if public.exists():
                    msg = (
                        f"{private} is gone, but {public} is there: restore the key from a "
                        "backup; else remove both, and enrol every device anew"
                    )
                    raise InvalidInputError(msg)
                write_atomic(private, private_pem(new_key()), mode=0o600)
            key = load_key(private)
            if not public.exists():
                write_atomic(public, _itself(key, now).public_bytes(Encoding.PEM), mode=0o644)
            try:
                certificate = x509.load_pem_x509_certificate(public.read_bytes())
            except ValueError as error:
                msg = f"{public} is damaged ({error}): restore it from a backup"
                raise IntegrityError(msg) from error
    if certificate.public_key() != key.public_key():
        msg = f"{public} is not the certificate of {private}: restore the pair from a backup"
        raise IntegrityError(msg)
    return Authority(key=key, certificate=certificate)


def _itself(key: ec.EllipticCurvePrivateKey, now: float) -> x509.Certificate:
    public = key.public_key()
    # Two authorities must not have one name: a file may hold the certificates of both.
    name = _name(f"anabranch {fingerprint(public)[:16]}")
    begin = _time(now)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - _BEFORE)
        .not_valid_after(begin + _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, SHA256())
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(text))
    except ValueError:
        pass
    try:
        return x509.DNSName(text)
    except ValueError as error:
        msg = f"{text!r} is neither a host's name nor an address ({error})"
        raise InvalidInputError(msg) from error


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(int(seconds), UTC)
