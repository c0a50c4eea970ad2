"""Enrolment: a device makes its key, and trades a one-time token for a certificate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from edge.identity.files import (
    IDENTITY,
    PENDING,
    Identity,
    check_authorities,
    load_identity,
    pending_key,
    request,
    store_identity,
)
from edge.process import locked
from protos.errors import AnabranchError, InvalidInputError, RefusedError, UnavailableError
from protos.v1 import identity_pb2, identity_pb2_grpc

if TYPE_CHECKING:
    from pathlib import Path

_CALL_S = 20.0
_REFUSED = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT}


def enroll(
    folder: Path,
    *,
    cloud: str,
    token: str,
    authorities: bytes,
    device: str | None = None,
    again: bool = False,
) -> tuple[Identity, str]:
    """Enrol a device; calling it again after a failure at any moment is right.

    Args:
        folder: of the identity.
        cloud: the enrolment service, ``host:port``.
        token: the one-time token.
        authorities: PEM of the cloud's certificate authority; the server must have a certificate
            from it.
        device: its name, to be sure; the token says it, too.
        again: replace an identity that is there already.

    Returns:
        The identity and the device's channel.

    Raises:
        InvalidInputError: it is enrolled already, or ``authorities`` holds no certificate.
        RefusedError: the cloud does not take the token or the request.
        UnavailableError: the cloud does not answer, or it is not the one that is believed.
        IntegrityError: the cloud gave something else than was asked for.
        StorageError: the disk is full or failed.
    """
    check_authorities(authorities, "the file given as --ca")
    with locked(folder):
        if (folder / IDENTITY).exists() and not (folder / PENDING).exists() and not again:
            known = load_identity(folder)
            msg = (
                f"{folder} holds the identity of device {known.device}, which ends "
                f"{known.certificate.not_valid_after_utc:%Y-%m-%d}: give --again to replace it"
            )
            raise InvalidInputError(msg)
        key = pending_key(folder)
        credentials = grpc.ssl_channel_credentials(root_certificates=authorities)
        ask = identity_pb2.EnrollRequest(token=token, csr=request(key, device=device))
        with grpc.secure_channel(cloud, credentials) as channel:
            try:
                reply = identity_pb2_grpc.EnrolmentStub(channel).Enroll(ask, timeout=_CALL_S)
            except grpc.RpcError as error:
                raise translate(error, cloud) from error
        identity = store_identity(
            folder, key=key, certificate=reply.certificate, authorities=authorities
        )
        (folder / PENDING).unlink()
    return identity, str(reply.channel)


def translate(error: grpc.RpcError, cloud: str) -> AnabranchError:
    """What a failed call for a certificate means."""
    code, details = error.code(), error.details()
    if code in _REFUSED:
        return RefusedError(f"the cloud at {cloud} gives no certificate: {details}")
    return UnavailableError(
        f"the cloud at {cloud} does not answer, or ca.pem is not of its authority "
        f"({code.name}: {details})"
    )
