"""TLS towards the broker, as ``ssl`` does it; gRPC has credentials of its own."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from edge.delta.files import storage_errors
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path


def client_context(*, pair: Path, authorities: bytes) -> ssl.SSLContext:
    """What a client shows, and whom it believes.

    Args:
        pair: PEM file of its key and certificate.
        authorities: PEM of those who sign the server's certificate, which must have the server's
            name among its alternative names.

    Raises:
        IntegrityError: the files do not belong together.
        StorageError: they cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    context.load_verify_locations(cadata=authorities.decode("ascii"))
    try:
        with storage_errors(f"reading {pair}"):
            context.load_cert_chain(pair)
    except ssl.SSLError as error:
        msg = f"{pair} holds no key with its certificate: {error}"
        raise IntegrityError(msg) from error
    return context
