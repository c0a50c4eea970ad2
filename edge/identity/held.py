"""The identity of a running agent: held, shown, and kept in force."""

from __future__ import annotations

import logging
import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edge.identity.files import load_identity
from edge.identity.metrics import CertificateMetrics
from edge.identity.renew import Renewal, Renewer, channel_credentials
from edge.process import locked
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Protocol

    import grpc
    from prometheus_client import CollectorRegistry

    from edge.identity.files import Identity

    class GrpcLink(Protocol):
        """A connection that can be made anew with other credentials."""

        def reconnect(self, credentials: grpc.ChannelCredentials) -> None:
            """Do it."""

    class Link(Protocol):
        """A connection that can be made anew; it reads the credentials itself."""

        def reconnect(self) -> None:
            """Do it."""


_log = logging.getLogger(__name__)


@contextmanager
def held_identity(folder: Path | None, *, device: str) -> Iterator[Identity | None]:
    """Hold the identity in a folder, so that nobody enrols the device anew meanwhile.

    Args:
        folder: None for a device without one.
        device: whose it must be.

    Raises:
        InvalidInputError: it is another device's, or another process holds it.
        IntegrityError: a file is damaged.
        StorageError: a file cannot be read.
    """
    if folder is None:
        _log.warning(
            "without TLS: what people say is not encrypted on its way to the cloud. Good for one "
            "machine or a network of yours alone; `anabranch device enroll` ends it"
        )
        yield None
        return
    load_identity(folder)  # before a lock is put into a folder that is none
    with locked(folder):
        identity = load_identity(folder)
        if identity.device != device:
            msg = (
                f"the certificate in {folder} is of device {identity.device!r}, not {device!r}: "
                "leave --device out, or enrol again"
            )
            raise InvalidInputError(msg)
        yield identity


@contextmanager
def renewed_identity(
    identity: Identity | None,
    *,
    cloud: str,
    fleet: GrpcLink,
    broker: Link,
    registry: CollectorRegistry,
) -> Iterator[None]:
    """Renew an identity inside, and have both connections use the new certificate."""
    if identity is None:
        yield
        return

    def renewed(new: Identity) -> None:
        fleet.reconnect(channel_credentials(new))
        broker.reconnect()

    renewal = Renewal(
        identity,
        renewer=Renewer(cloud),
        renewed=renewed,
        clock=time.time,
        random=random.SystemRandom(),
        metrics=CertificateMetrics(registry),
    )
    renewal.start()
    try:
        yield
    finally:
        renewal.stop()
