"""The register of devices: who was invited, who has which certificate, and what was taken back.

Everything is one transaction of the database, so a device that asks twice, or a power cut at any
moment, burns no token: the token remembers which key used it, and the same key gets the same
certificate again.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import Engine, Select, func, select

from cloud.db import create_tables, read, write
from cloud.identity.authority import RENEWABLE
from cloud.identity.request import Request, read_request
from cloud.identity.tables import CertificateRow, EnrolledRow, RevisionRow, TokenRow
from protos.errors import InvalidInputError, RefusedError
from protos.topics import check_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

    from cloud.identity.authority import Authority

DEVICE_LIFE_S = 365 * 86400.0
"""Seconds. A revocation needs no expiry to take effect, and a device may lie in a drawer."""
TOKEN_LIFE_S = 24 * 3600.0


@dataclass(frozen=True)
class Issued:
    """A certificate (DER), and whose it is."""

    device: str
    channel: str
    certificate: bytes
    repeated: bool


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """A device for people: ``state`` is invited, enrolled, expired, revoked or added.

    Attributes:
        expires: when its newest certificate or token ends, in seconds since 1970; 0 without one.
        reason: why its newest certificate was revoked.
    """

    device: str
    channel: str
    state: str
    expires: float
    reason: str


@dataclass(frozen=True)
class Certified:
    """A certificate that has not expired. Times in milliseconds since 1970."""

    device: str
    channel: str
    serial: int
    not_after_ms: int
    revoked_ms: int | None
    reason: str

    def in_force(self, now: float) -> bool:
        """Whether it may be shown at ``now`` (seconds since 1970)."""
        return self.revoked_ms is None and self.not_after_ms > now * 1000


class Registry:
    """Devices and their certificates. Safe to use from several threads and processes.

    Args:
        engine: from :func:`cloud.db.open_database`.
        authority: signs.
        clock: seconds since 1970.
        life_s: seconds that a device's certificate is good for.
        new_token: makes a text that nobody can guess.

    Raises:
        StorageError: from every method: the disk is full or failed, and nothing was changed.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        authority: Authority,
        clock: Callable[[], float],
        life_s: float = DEVICE_LIFE_S,
        new_token: Callable[[], str] = lambda: secrets.token_urlsafe(32),
    ) -> None:
        self._engine = engine
        self._authority = authority
        self._clock = clock
        self._life_s = life_s
        self._new_token = new_token
        create_tables(engine, EnrolledRow, TokenRow, CertificateRow, RevisionRow)

    def add(self, device: str, *, channel: str) -> None:
        """Let a device be of a channel; one that is there already is left as it is.

        Raises:
            InvalidInputError: a name is malformed, or the device belongs to another channel.
        """
        check_name(device, "device")
        check_name(channel, "channel")
        with write(self._engine) as session:
            row = session.get(EnrolledRow, device)
            if row is None:
                session.add(EnrolledRow(device=device, channel=channel, added_ms=self._now_ms()))
            elif row.channel != channel:
                msg = (
                    f"device {device} belongs to channel {row.channel} already: "
                    "names of devices are unique in a cloud; choose another"
                )
                raise InvalidInputError(msg)

    def invite(self, device: str, *, life_s: float = TOKEN_LIFE_S) -> str:
        """A new one-time token for a device; only its digest is kept.

        Raises:
            InvalidInputError: the device was never added.
        """
        token = self._new_token()
        with write(self._engine) as session:
            if session.get(EnrolledRow, device) is None:
                msg = f"no device is called {device!r}: add it with `anabranch device add`"
                raise InvalidInputError(msg)
            session.add(
                TokenRow(
                    sha256=_sha256(token),
                    device=device,
                    expires_ms=self._now_ms() + int(life_s * 1000),
                )
            )
        return token

    def enroll(self, token: str, request: bytes) -> Issued:
        """Trade a token for a certificate; certificates that the device had before end.

        Raises:
            RefusedError: the token is unknown, expired, or another key used it; or the request is
                for another device.
            InvalidInputError: the request is malformed.
        """
        now_ms = self._now_ms()
        with write(self._engine) as session:
            row = session.get(TokenRow, _sha256(token), with_for_update=True)
            if row is None:
                msg = (
                    "this token is not known: it was revoked, or never given; "
                    "ask for one by `anabranch device token`"
                )
                raise RefusedError(msg)
            asked = read_request(request, device=row.device)
            if row.serial is not None:
                return _again(session, row, asked, now_ms)
            if row.expires_ms <= now_ms:
                msg = "this token has expired: ask for another by `anabranch device token`"
                raise RefusedError(msg)
            if session.scalar(_revoked_key(asked.fingerprint)) is not None:
                msg = "this key was revoked: make another one (remove pending.key, and try again)"
                raise RefusedError(msg)
            for old in session.scalars(_running(row.device, now_ms)):
                old.revoked_ms, old.reason = now_ms, "superseded by another enrolment"
            certificate = self._issue(session, row.device, asked)
            row.key, row.serial = asked.fingerprint, certificate.serial
            return _issued(session, certificate, repeated=False)

    def renew(self, device: str, serial: int, request: bytes) -> Issued:
        """Another certificate for the key of the one with ``serial``, if that is old enough.

        Raises:
            RefusedError: that certificate is not in force, or the request is for another device
                or key.
            InvalidInputError: the request is malformed.
        """
        now_ms = self._now_ms()
        asked = read_request(request, device=device)
        with write(self._engine) as session:
            shown = session.get(CertificateRow, _hex(serial), with_for_update=True)
            if shown is None or shown.device != device or shown.revoked_ms is not None:
                msg = f"the certificate of device {device} is not in force: enrol it again"
                raise RefusedError(msg)
            if asked.fingerprint != shown.key:
                msg = "a renewal is for the key of the certificate that is renewed"
                raise RefusedError(msg)
            newest = session.scalars(_running(device, now_ms)).first()
            # One that was just given may have been lost on its way, and asks are not to pile up.
            if newest is not None and newest.key == shown.key:
                life_ms = newest.not_after_ms - newest.not_before_ms
                if now_ms < newest.not_before_ms + RENEWABLE * life_ms:
                    return _issued(session, newest, repeated=True)
            return _issued(session, self._issue(session, device, asked), repeated=False)

    def revoke(self, device: str, *, reason: str) -> int:
        """Take back every certificate and every token of a device; how many certificates.

        Raises:
            InvalidInputError: the device was never added.
        """
        now_ms = self._now_ms()
        with write(self._engine) as session:
            if session.get(EnrolledRow, device) is None:
                msg = f"no device is called {device!r}: `anabranch device list` names them"
                raise InvalidInputError(msg)
            running = session.scalars(_running(device, now_ms)).all()
            for row in running:
                row.revoked_ms, row.reason = now_ms, reason
            for token in session.scalars(select(TokenRow).where(TokenRow.device == device)):
                session.delete(token)
            _changed(session)
            return len(running)

    def devices(self) -> list[Enrolled]:
        """All devices by name."""
        now_ms = self._now_ms()
        with read(self._engine) as session:
            newest: dict[str, CertificateRow] = {}
            for row in session.scalars(
                select(CertificateRow).order_by(
                    CertificateRow.revoked_ms.is_(None), CertificateRow.not_after_ms
                )
            ):
                newest[row.device] = row
            unused = select(TokenRow.device, func.max(TokenRow.expires_ms)).where(
                TokenRow.serial.is_(None), TokenRow.expires_ms > now_ms
            )
            invited = {row[0]: row[1] for row in session.execute(unused.group_by(TokenRow.device))}
            return [
                _describe(row, newest.get(row.device), invited.get(row.device), now_ms)
                for row in session.scalars(select(EnrolledRow).order_by(EnrolledRow.device))
            ]

    def revision(self) -> int:
        """Grows whenever :meth:`certified` may have changed, except by time."""
        with read(self._engine) as session:
            return session.scalar(select(RevisionRow.number)) or 0

    def certified(self) -> list[Certified]:
        """Every certificate that has not expired, revoked ones too."""
        query = (
            select(CertificateRow, EnrolledRow.channel)
            .join(EnrolledRow, EnrolledRow.device == CertificateRow.device)
            .where(CertificateRow.not_after_ms > self._now_ms())
        )
        with read(self._engine) as session:
            return [
                Certified(
                    row.device,
                    channel,
                    int(row.serial, 16),
                    row.not_after_ms,
                    row.revoked_ms,
                    row.reason or "",
                )
                for row, channel in session.execute(query)
            ]

    def _issue(self, session: Session, device: str, asked: Request) -> CertificateRow:
        certificate = self._authority.device(
            device, asked.key, now=self._clock(), life_s=self._life_s
        )
        row = CertificateRow(
            serial=_hex(certificate.serial_number),
            device=device,
            key=asked.fingerprint,
            not_before_ms=int(certificate.not_valid_before_utc.timestamp() * 1000),
            not_after_ms=int(certificate.not_valid_after_utc.timestamp() * 1000),
            der=certificate.public_bytes(Encoding.DER),
        )
        session.add(row)
        _changed(session)
        return row

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def _again(session: Session, row: TokenRow, asked: Request, now_ms: int) -> Issued:
    """The answer to a token that was used: the same to the same key, as long as it is in force."""
    if row.key != asked.fingerprint:
        msg = (
            "this token was used already, by another key. If that was not this device, revoke it "
            "(`anabranch device revoke`); else ask for another by `anabranch device token`"
        )
        raise RefusedError(msg)
    given = session.get(CertificateRow, row.serial)
    if given is None or given.revoked_ms is not None or given.not_after_ms <= now_ms:
        msg = (
            "the certificate that this token gave is not in force any more: "
            "ask for another token by `anabranch device token`"
        )
        raise RefusedError(msg)
    return _issued(session, given, repeated=True)


def _issued(session: Session, row: CertificateRow, *, repeated: bool) -> Issued:
    device = session.get_one(EnrolledRow, row.device)
    return Issued(row.device, device.channel, row.der, repeated)


def _changed(session: Session) -> None:
    row = session.get(RevisionRow, 1, with_for_update=True)
    if row is None:
        session.add(RevisionRow(one=1, number=1))
    else:
        row.number += 1


def _running(device: str, now_ms: int) -> Select[CertificateRow]:
    """Certificates of a device that are in force, the newest first."""
    return (
        select(CertificateRow)
        .where(
            CertificateRow.device == device,
            CertificateRow.revoked_ms.is_(None),
            CertificateRow.not_after_ms > now_ms,
        )
        .order_by(CertificateRow.not_after_ms.desc())
    )


def _revoked_key(key: str) -> Select[str]:
    return select(CertificateRow.serial).where(
        CertificateRow.key == key, CertificateRow.revoked_ms.is_not(None)
    )


def _describe(
    row: EnrolledRow, newest: CertificateRow | None, invited_ms: int | None, now_ms: int
) -> Enrolled:
    state, expires_ms, reason = "added", 0, ""
    if newest is not None:
        expires_ms, reason = newest.not_after_ms, newest.reason or ""
        if newest.revoked_ms is not None:
            state = "revoked"
        else:
            state = "enrolled" if newest.not_after_ms > now_ms else "expired"
    if state != "enrolled" and invited_ms is not None:
        state, expires_ms = "invited", invited_ms
    return Enrolled(
        device=row.device,
        channel=row.channel,
        state=state,
        expires=expires_ms / 1000,
        reason=reason,
    )


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _hex(serial: int) -> str:
    return f"{serial:040x}"
