"""Enrolment and renewal over gRPC, and the certificates of the servers themselves.

Two ports: who enrols has no certificate yet, and gRPC's servers either demand one or do not look at
it. So enrolment has a server of its own that offers nothing else.
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import grpc
from cryptography.hazmat.primitives.serialization import Encoding
from grpc import aio

from cloud.fleet.service import Errors, bind
from cloud.identity.authority import RENEWABLE
from edge.identity.keys import new_key, private_pem
from protos.errors import AnabranchError
from protos.v1 import identity_pb2, identity_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloud.identity.access import CertificateAccess
    from cloud.identity.authority import Authority
    from cloud.identity.metrics import IdentityMetrics
    from cloud.identity.registry import Issued, Registry
    from cloud.identity.roster import RosterKeeper

_MAX_MESSAGE = 64 * 1024
_MAX_CALLS = 64


class _Certificates:
    """Hands out certificates and counts them."""

    def __init__(
        self, *, registry: Registry, keeper: RosterKeeper, metrics: IdentityMetrics
    ) -> None:
        self._registry = registry
        self._keeper = keeper
        self._metrics = metrics

    async def _give(self, ask: Callable[[], Issued], what: str) -> identity_pb2.CertificateReply:
        try:
            issued = await asyncio.to_thread(ask)
        except AnabranchError:
            self._metrics.requested("refused")
            raise
        # Else the device would be refused with the certificate that it was just given.
        await asyncio.to_thread(self._keeper.refresh)
        self._metrics.requested("repeated" if issued.repeated else what)
        return identity_pb2.CertificateReply(certificate=issued.certificate, channel=issued.channel)


class EnrolmentService(_Certificates, identity_pb2_grpc.EnrolmentServicer):
    """Trades one-time tokens for certificates."""

    async def Enroll(  # noqa: N802 - the name is the protocol's
        self,
        request: identity_pb2.EnrollRequest,
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb2.CertificateReply:
        """See ``protos/v1/identity.proto``."""
        async with Errors(context):
            return await self._give(
                lambda: self._registry.enroll(request.token, request.csr), "enrolled"
            )


class RenewalService(_Certificates, identity_pb2_grpc.RenewalServicer):
    """Gives a device that is who it says another certificate."""

    def __init__(
        self,
        *,
        registry: Registry,
        keeper: RosterKeeper,
        metrics: IdentityMetrics,
        access: CertificateAccess,
    ) -> None:
        super().__init__(registry=registry, keeper=keeper, metrics=metrics)
        self._access = access

    async def Renew(  # noqa: N802 - the name is the protocol's
        self,
        request: identity_pb2.RenewRequest,
        context: aio.ServicerContext[Any, Any],
    ) -> identity_pb2.CertificateReply:
        """See ``protos/v1/identity.proto``."""
        async with Errors(context):
            caller = self._access.identify(context)
            return await self._give(
                lambda: self._registry.renew(caller.device, caller.serial, request.csr), "renewed"
            )


class ServerCertificate:
    """The certificate of the cloud's own servers; its key never leaves the memory.

    Args:
        authority: signs it.
        hosts: names and addresses that devices connect to.
        clock: seconds since 1970.
        metrics: tells when it ends.
    """

    def __init__(
        self,
        *,
        authority: Authority,
        hosts: Sequence[str],
        clock: Callable[[], float],
        metrics: IdentityMetrics,
    ) -> None:
        self._authority = authority
        self._hosts = hosts
        self._clock = clock
        self._metrics = metrics
        self._lock = threading.Lock()  # gRPC asks from threads of its own
        self._renew_at = 0.0
        self._made = self._make()

    def credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        """Credentials of a server; a ``mutual`` one talks to nobody without a certificate of ours.

        gRPC asks for the certificate at each handshake, so that a server need not restart for a new
        one.
        """
        current: list[object] = [None]

        def configuration() -> grpc.ServerCertificateConfiguration | None:
            made = self._current()
            if made is current[0]:
                return None
            current[0] = made
            return self._configuration(made, mutual=mutual)

        first = self._configuration(self._current(), mutual=mutual)
        # None means that nothing has changed; the types do not know.
        return grpc.dynamic_ssl_server_credentials(
            first,
            configuration,  # type: ignore[arg-type]
            require_client_authentication=mutual,
        )

    def _current(self) -> tuple[bytes, bytes]:
        with self._lock:
            if self._clock() >= self._renew_at:
                self._made = self._make()
            return self._made

    def _make(self) -> tuple[bytes, bytes]:
        now = self._clock()
        key = new_key()
        certificate = self._authority.server(self._hosts, key.public_key(), now=now)
        end = certificate.not_valid_after_utc.timestamp()
        self._renew_at = now + RENEWABLE * (end - now)
        self._metrics.server_expires.set(end)
        return private_pem(key), certificate.public_bytes(Encoding.PEM)

    def _configuration(
        self, made: tuple[bytes, bytes], *, mutual: bool
    ) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [made], root_certificates=self._authority.pem if mutual else None
        )


async def serve_enrolment(
    service: EnrolmentService, *, listen: str, credentials: grpc.ServerCredentials
) -> tuple[aio.Server, int]:
    """Start to enrol devices on ``host:port``; port 0 takes a free one.

    Raises:
        UnavailableError: the address cannot be bound.
    """
    options = (
        ("grpc.max_receive_message_length", _MAX_MESSAGE),
        ("grpc.max_concurrent_streams", 4),
        ("grpc.so_reuseport", 0),
    )
    server = aio.server(options=options, maximum_concurrent_rpcs=_MAX_CALLS)
    identity_pb2_grpc.add_EnrolmentServicer_to_server(service, server)
    port = bind(server, listen, credentials)
    await server.start()
    return server, port
