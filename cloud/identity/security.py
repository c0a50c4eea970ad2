"""Everything about identity that a running cloud holds, put together."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloud.identity.access import CertificateAccess, FleetLimits
from cloud.identity.authority import host_names, open_authority
from cloud.identity.broker_folder import BrokerFolder
from cloud.identity.metrics import IdentityMetrics
from cloud.identity.registry import DEVICE_LIFE_S, Registry
from cloud.identity.roster import RosterKeeper
from cloud.identity.service import EnrolmentService, RenewalService, ServerCertificate
from edge.delta.files import write_atomic
from edge.identity.keys import new_key, pair_pem
from edge.identity.tls import client_context
from edge.process import listen_address
from protos.errors import StorageError
from protos.v1 import identity_pb2_grpc

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from pathlib import Path

    from grpc import aio
    from prometheus_client import CollectorRegistry
    from sqlalchemy import Engine

_log = logging.getLogger(__name__)
FOLDER = "identity"
"""Of the cloud's state folder."""
_LOOK_S = 2.0
_TROUBLE_S = 10.0
_FILES_EVERY = (
    1800  # looks: an hour; certificates of servers end without any change of the register
)


@dataclass(frozen=True, kw_only=True)
class TlsConfig:
    """How the cloud is reached with TLS.

    Attributes:
        hosts: names and addresses by which devices reach cloud and broker.
        enrolment: where devices enrol, ``host:port``; port 0 takes a free one.
        broker_folder: what Mosquitto reads; None: nobody writes it.
        device_life_s: seconds that a device's certificate is good for.
        limits: what one device may have of the fleet service.
    """

    hosts: tuple[str, ...]
    enrolment: str = "127.0.0.1:50052"
    broker_folder: Path | None = None
    device_life_s: float = DEVICE_LIFE_S
    limits: FleetLimits = field(default_factory=FleetLimits)

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is touched."""
        host_names(self.hosts)
        listen_address(self.enrolment)


def open_registry(
    state: Path, engine: Engine, *, clock: Callable[[], float], life_s: float = DEVICE_LIFE_S
) -> Registry:
    """The register of devices in a cloud's state folder, with its authority.

    Raises:
        InvalidInputError: the authority's key is missing, or others may read it.
        IntegrityError: the authority's files are damaged.
        StorageError: they cannot be read or written.
    """
    authority = open_authority(state / FOLDER, now=clock())
    return Registry(engine, authority=authority, clock=clock, life_s=life_s)


class Security:
    """The authority, the register, and what a running cloud makes of them.

    Args:
        state: the cloud's state folder.
        config: how it is reached.
        engine: its database.
        clock: seconds since 1970.
        registry: where the metrics go.

    Raises:
        InvalidInputError: see :func:`open_registry`.
        IntegrityError: likewise.
        StorageError: likewise.
    """

    def __init__(
        self,
        *,
        state: Path,
        config: TlsConfig,
        engine: Engine,
        clock: Callable[[], float],
        registry: CollectorRegistry,
    ) -> None:
        self._clock = clock
        self._pair = state / FOLDER / "cloud.pem"
        self._authority = open_authority(state / FOLDER, now=clock())
        self._registry = Registry(
            engine, authority=self._authority, clock=clock, life_s=config.device_life_s
        )
        metrics = IdentityMetrics(registry)
        self.keeper = RosterKeeper(self._registry, clock=clock)
        self.access = CertificateAccess(keeper=self.keeper, metrics=metrics, limits=config.limits)
        self.enrolment = EnrolmentService(
            registry=self._registry, keeper=self.keeper, metrics=metrics
        )
        self.renewal = RenewalService(
            registry=self._registry, keeper=self.keeper, metrics=metrics, access=self.access
        )
        self.server = ServerCertificate(
            authority=self._authority, hosts=config.hosts, clock=clock, metrics=metrics
        )
        self._broker = config.broker_folder and BrokerFolder(
            config.broker_folder, authority=self._authority, hosts=config.hosts, clock=clock
        )
        metrics.watch_devices(lambda: self.keeper.roster.in_force(now=clock()))

    def look(self, *, files: bool = True) -> None:
        """See what has changed in the register; write the broker's files.

        Args:
            files: look at the files even if the register has not changed.

        Raises:
            StorageError: the register cannot be read, or the files not be written.
        """
        changed = self.keeper.refresh()
        if self._broker and (changed or files):
            self._broker.update(self._registry.certified())

    async def keep_looking(self) -> None:
        """End streams of devices whose certificate has ended, seconds after it has."""
        looks = 0
        files = False
        while True:
            pause = _LOOK_S
            looks += 1
            try:
                await asyncio.to_thread(self.look, files=files or looks % _FILES_EVERY == 0)
                files = False
            except StorageError as error:
                _log.error("%s", error)  # the message is for people
                pause, files = _TROUBLE_S, True
            except Exception:  # noqa: BLE001 - nobody would be revoked any more
                _log.exception("cannot look who was revoked; again in %.0f s", _TROUBLE_S)
                pause, files = _TROUBLE_S, True
            self.access.end_revoked()
            await asyncio.sleep(pause)

    def serve_renewal(self, server: aio.Server) -> None:
        """Have the fleet's server renew certificates, too."""
        identity_pb2_grpc.add_RenewalServicer_to_server(self.renewal, server)

    def broker_context(self) -> ssl.SSLContext:
        """What the cloud shows to the broker, and whom it believes.

        Raises:
            StorageError: its certificate cannot be stored.
        """
        now = self._clock()
        if self._authority.lasting(self._pair, now=now) is None:
            key = new_key()
            certificate = self._authority.cloud(key.public_key(), now=now)
            write_atomic(self._pair, pair_pem(key, certificate), mode=0o600)
        return client_context(pair=self._pair, authorities=self._authority.pem)
