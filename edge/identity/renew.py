"""Renewal: the running agent asks for another certificate when two thirds of its life are over."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from edge.identity.enroll import translate
from edge.identity.files import Identity, request, store_identity
from edge.link.policy import full_jitter
from protos.errors import AnabranchError
from protos.v1 import identity_pb2, identity_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from edge.identity.metrics import CertificateMetrics


_log = logging.getLogger(__name__)
_CALL_S = 20.0
_DUE = 2 / 3
_SPREAD = 1 / 20
_RETRY_BASE_S = 60.0
_RETRY_CAP_S = 6 * 3600.0
_LOOK_S = 3600.0
"""Nothing sleeps longer: clocks of devices jump when they find out what time it is."""


def due_at(not_before: float, not_after: float, *, random: Random) -> float:
    """When to renew: after two thirds of a certificate's life and up to a twentieth more.

    Devices that were enrolled together must not come back together.

    >>> import random
    >>> 200 <= due_at(0, 300, random=random.Random(0)) <= 215
    True
    """
    return not_before + (not_after - not_before) * (_DUE + random.uniform(0, _SPREAD))


@dataclass(frozen=True)
class Renewer:
    """Asks for another certificate.

    Attributes:
        cloud: the fleet's ``host:port``, where renewal is served, too.
    """

    cloud: str

    def renew(self, identity: Identity) -> Identity:
        """Get and store another certificate for the same key.

        Raises:
            RefusedError: this device is not to have one.
            UnavailableError: the cloud does not answer.
            IntegrityError: it gave something else.
            StorageError: the disk is full or failed; the old certificate stays.
        """
        ask = identity_pb2.RenewRequest(csr=request(identity.key, device=identity.device))
        with grpc.secure_channel(self.cloud, channel_credentials(identity)) as channel:
            try:
                reply = identity_pb2_grpc.RenewalStub(channel).Renew(ask, timeout=_CALL_S)
            except grpc.RpcError as error:
                raise translate(error, self.cloud) from error
        return store_identity(
            identity.folder,
            key=identity.key,
            certificate=reply.certificate,
            authorities=identity.authorities,
        )


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """What a device shows to the cloud, and whom it believes."""
    return grpc.ssl_channel_credentials(
        root_certificates=identity.authorities,
        private_key=identity.key_pem,
        certificate_chain=identity.certificate_pem,
    )


class Renewal:
    """Keeps an identity in force, in a thread of its own.

    Args:
        identity: the one that is in force.
        renewer: gets the next.
        renewed: told of each new one; connections that are open go on with the old one until they
            are made again.
        clock: seconds since 1970.
        random: for jitter.
        metrics: tells when it ends.
        look_s: seconds that it sleeps at most.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        renewer: Renewer,
        renewed: Callable[[Identity], None],
        clock: Callable[[], float],
        random: Random,
        metrics: CertificateMetrics,
        look_s: float = _LOOK_S,
    ) -> None:
        self.identity = identity
        self._renewer = renewer
        self._renewed = renewed
        self._clock = clock
        self._random = random
        self._look_s = look_s
        self._due = due_at(identity.not_before, identity.not_after, random=random)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)
        self._metrics = metrics
        self._metrics.expires.set(identity.not_after)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; a call that is under way is waited for."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        fails = 0
        while not self._stop.is_set():
            wait = min(self._look_s, self._due - self._clock())
            if wait > 0:
                self._stop.wait(wait)
                continue
            try:
                self._once()
                fails = 0
            except AnabranchError as error:
                self._metrics.failed.inc()
                _log.warning(
                    "the certificate ends %.1f days from now and cannot be renewed: %s",
                    (self.identity.not_after - self._clock()) / 86400,
                    error,
                )
                self._stop.wait(
                    full_jitter(
                        fails, base_s=_RETRY_BASE_S, cap_s=_RETRY_CAP_S, random=self._random
                    )
                )
                fails += 1

    def _once(self) -> None:
        identity = self._renewer.renew(self.identity)
        # The cloud gives the same one again to who asks too early: its clock decides.
        fresh = identity.not_after > self.identity.not_after
        due = due_at(identity.not_before, identity.not_after, random=self._random)
        self.identity = identity
        self._due = due if fresh else max(due, self._clock() + self._look_s)
        self._metrics.expires.set(identity.not_after)
        if fresh:
            _log.info(
                "the certificate was renewed until %s", identity.certificate.not_valid_after_utc
            )
            self._renewed(identity)
