"""Access to the fleet service by certificate: identity, revocation, limits a device.

Everything here happens in the event loop's thread, on pictures in memory: a call waits for nothing.
"""

from __future__ import annotations

import time
from collections import Counter as Tally
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from cryptography import x509

from cloud.identity.metrics import IdentityMetrics, Refusal
from cloud.identity.roster import check_channel
from cloud.quota import DAY_S, Buckets, Limit
from protos.errors import AnabranchError, QuotaError, RefusedError
from protos.identity import device_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cloud.fleet.access import Context
    from cloud.identity.registry import Certified
    from cloud.identity.roster import RosterKeeper

_RETRY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class FleetLimits:
    """What one device may have.

    Attributes:
        watches: watch streams at once; a dead connection holds one until its pings fail.
        reads: reads at once.
        bytes: that it may read at once, and what comes back in a second.
    """

    watches: int = 8
    reads: int = 4
    bytes: Limit = field(default_factory=lambda: Limit(2 * 1024**3, 2 * 1024**3 / DAY_S))


class CertificateAccess:
    """See :class:`cloud.fleet.access.Access`.

    Args:
        keeper: knows which certificates are in force.
        limits: what one device may have.
        metrics: counts refusals.
        monotonic: seconds of a clock that only goes on.
    """

    def __init__(
        self,
        *,
        keeper: RosterKeeper,
        metrics: IdentityMetrics,
        limits: FleetLimits | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keeper = keeper
        self.metrics = metrics
        self.limits = limits or FleetLimits()
        self.monotonic = monotonic
        self.read = Buckets[str](self.limits.bytes)
        self.open: Tally[tuple[str, str]] = Tally()
        self._watching: dict[object, tuple[CertifiedCaller, Callable[[], None]]] = {}

    def admit(self, context: Context, *, channel: str, device: str | None) -> CertifiedCaller:
        """See :class:`cloud.fleet.access.Access`."""
        caller = self.identify(context)
        certified = caller.check()
        if device is not None and device != caller.device:
            self.metrics.refused(Refusal.IDENTITY)
            msg = f"the message says {device!r}, the certificate {caller.device!r}"
            raise RefusedError(msg)
        try:
            check_channel(certified, channel)
        except RefusedError:
            self.metrics.refused(Refusal.IDENTITY)
            raise
        return caller

    def identify(self, context: Context) -> CertifiedCaller:
        """Whose certificate the connection has shown.

        Raises:
            RefusedError: no device's.
        """
        try:
            device, serial = _shown(context)
        except AnabranchError as error:
            self.metrics.refused(Refusal.IDENTITY)
            raise RefusedError(str(error)) from error
        return CertifiedCaller(self, device, serial)

    def end_revoked(self) -> None:
        """Wake the streams of devices that may not call any more; they end by themselves."""
        for caller, wake in list(self._watching.values()):
            try:
                self.keeper.check(caller.device, caller.serial)
            except RefusedError:
                wake()

    @contextmanager
    def counted(self, device: str, what: str, most: int) -> Iterator[None]:
        """One more of something is under way inside, of ``most``."""
        if self.open[device, what] >= most:
            self.metrics.refused(Refusal.STREAMS)
            msg = f"device {device} has {most} {what} open already: one must end first"
            raise QuotaError(msg, retry_after_s=_RETRY_S)
        self.open[device, what] += 1
        try:
            yield
        finally:
            self.open[device, what] -= 1
            if not self.open[device, what]:
                del self.open[device, what]

    @contextmanager
    def woken(self, caller: CertifiedCaller, wake: Callable[[], None]) -> Iterator[None]:
        """``wake`` is called inside when the caller's certificate ends."""
        token = object()
        self._watching[token] = (caller, wake)
        try:
            yield
        finally:
            del self._watching[token]


class CertifiedCaller:
    """See :class:`cloud.fleet.access.Caller`."""

    def __init__(self, access: CertificateAccess, device: str, serial: int) -> None:
        self._access = access
        self.device = device
        self.serial = serial

    def check(self) -> Certified:
        """See :class:`cloud.fleet.access.Caller`."""
        try:
            return self._access.keeper.check(self.device, self.serial)
        except RefusedError:
            self._access.metrics.refused(Refusal.CERTIFICATE)
            raise

    @contextmanager
    def watching(self, wake: Callable[[], None]) -> Iterator[None]:
        """See :class:`cloud.fleet.access.Caller`."""
        access = self._access
        with (
            access.counted(self.device, "watch streams", access.limits.watches),
            access.woken(self, wake),
        ):
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See :class:`cloud.fleet.access.Caller`."""
        access = self._access
        wait = access.read.wait_s(self.device, 1, now=access.monotonic())
        if wait:
            access.metrics.refused(Refusal.BYTES)
            msg = (
                f"device {self.device} has read {access.limits.bytes.capacity / 1024**2:.0f} MiB "
                f"within a day, which is its limit: it may go on in {wait:.0f} s"
            )
            raise QuotaError(msg, retry_after_s=wait)
        with access.counted(self.device, "reads", access.limits.reads):
            yield

    def sent(self, size: int) -> None:
        """See :class:`cloud.fleet.access.Caller`."""
        self._access.read.take(self.device, size, now=self._access.monotonic())


def _shown(context: Context) -> tuple[str, int]:
    """Device and serial number of the certificate that a connection has shown."""
    given = list(context.auth_context().get("x509_pem_cert", ()))
    if len(given) != 1:
        msg = "this connection has shown no certificate: enrol the device"
        raise RefusedError(msg)
    return _read(bytes(given[0]))


@lru_cache(maxsize=4096)
def _read(pem: bytes) -> tuple[str, int]:
    certificate = x509.load_pem_x509_certificate(pem)
    return device_of(certificate), certificate.serial_number
