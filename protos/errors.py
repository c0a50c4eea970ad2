"""One tree of errors for the whole system.

A message says what was wrong, where, and what to do. The tree is split by what the caller can do
about it, not by the part that raised it.
"""

from __future__ import annotations


class AnabranchError(Exception):
    """Root of every error that this project raises on purpose."""


class InvalidInputError(AnabranchError):
    """What was given is malformed or out of bounds: the giver must change it."""


class ContextLengthError(InvalidInputError):
    """A prompt does not fit into the student's context."""


class IntegrityError(AnabranchError):
    """Bytes are not what a digest or a signature says: fetch them again, or do not trust them."""


class SignatureError(IntegrityError):
    """What is signed, or should be, is not for this device or not what it claims to be."""


class WrongBaseError(IntegrityError):
    """A delta was made for another file: fetch the full file instead."""


class ProbeError(AnabranchError):
    """A new student failed its probe and must not serve."""


class StorageError(AnabranchError):
    """The disk is full or failed: what was stored before is still there; free space and retry."""


class UnavailableError(AnabranchError):
    """The other side cannot be reached now: retry later."""


class RefusedError(AnabranchError):
    """It is known who asks, and that is not allowed: somebody must change that first."""


class QuotaError(UnavailableError):
    """More was asked than one device may have: retry after ``retry_after_s`` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ExpiredError(UnavailableError):
    """Signed metadata is past its expiry by the clock here: set the clock right, or retry later."""


class TrainingError(AnabranchError):
    """A learning job cannot go on (no evidence, diverged, out of memory)."""
