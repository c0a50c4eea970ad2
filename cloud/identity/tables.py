"""Rows of devices, one-time tokens and certificates. Times in milliseconds since 1970."""

from __future__ import annotations

from sqlalchemy import BigInteger, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from cloud.db import Base


class EnrolledRow(Base):
    """A device that may have certificates, and the channel that it belongs to."""

    __tablename__ = "enrolled_devices"

    device: Mapped[str] = mapped_column(primary_key=True)
    channel: Mapped[str]
    added_ms: Mapped[int] = mapped_column(BigInteger)


class TokenRow(Base):
    """A one-time token, by the SHA-256 of its text; ``key`` is whose request used it."""

    __tablename__ = "enrolment_tokens"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey(EnrolledRow.device))
    expires_ms: Mapped[int] = mapped_column(BigInteger)
    key: Mapped[str | None]
    serial: Mapped[str | None]


class CertificateRow(Base):
    """A certificate that was signed here. ``serial`` and ``key`` in hexadecimal digits."""

    __tablename__ = "certificates"
    __table_args__ = (Index("certificates_by_device", "device", "not_after_ms"),)

    serial: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey(EnrolledRow.device))
    key: Mapped[str]
    not_before_ms: Mapped[int] = mapped_column(BigInteger)
    not_after_ms: Mapped[int] = mapped_column(BigInteger)
    der: Mapped[bytes]
    revoked_ms: Mapped[int | None] = mapped_column(BigInteger)
    reason: Mapped[str | None]


class RevisionRow(Base):
    """One row, whose number grows with every change of who may connect."""

    __tablename__ = "identity_revision"

    one: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int]
