"""What Mosquitto reads to know who is who: one folder, kept current by the cloud.

``ca.pem``
    the authority; devices must have a certificate of it.
``crl.pem``
    certificates that were revoked: nobody connects with one.
``acl``
    a device writes and reads its own topics only. A revoked one, nothing: its connection may still
    be open.
``server.pem``
    key and certificate of the broker itself.
``version``
    written last, whenever another of them has changed: a sign to reload (SIGHUP).
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from cryptography import x509

from cloud.identity.authority import host_names
from edge.delta.files import storage_errors, write_changed
from edge.identity.keys import new_key, pair_pem
from protos import topics
from protos.identity import CLOUD_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cloud.identity.authority import Authority
    from cloud.identity.registry import Certified

_log = logging.getLogger(__name__)
_OPEN = 0o644
_GROUP = 0o640  # the broker runs as another user, in the folder's group


class BrokerFolder:
    """Writes the files where they are not as they should be.

    Args:
        folder: Mosquitto reads it; its group should be Mosquitto's, with the set-group-id bit.
        authority: signs.
        hosts: names and addresses that clients reach the broker by.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        *,
        authority: Authority,
        hosts: Sequence[str],
        clock: Callable[[], float],
    ) -> None:
        self._folder = folder
        self._authority = authority
        self._hosts = hosts
        self._clock = clock

    def update(self, certified: Sequence[Certified]) -> bool:
        """Write what has changed, and then ``version``; whether anything had.

        Args:
            certified: every certificate that has not expired.

        Raises:
            StorageError: a file cannot be read or written.
        """
        now = self._clock()
        revoked = {c.serial: c.revoked_ms / 1000 for c in certified if c.revoked_ms is not None}
        with storage_errors(f"looking at the broker's files in {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            changed = self._put("ca.pem", self._authority.pem, _OPEN)
            changed |= self._put("acl", access_list(certified, now=now).encode(), _GROUP)
            if self._listed() != set(revoked):
                crl = self._authority.revocations(revoked.items(), now=now)
                changed |= self._put("crl.pem", crl, _OPEN)
            if not self._server_lasts(now):
                changed |= self._put("server.pem", self._server(now), _GROUP)
            parts = [
                (self._folder / name).read_bytes() for name in ("acl", "crl.pem", "server.pem")
            ]
        version = hashlib.sha256(b"".join(parts)).hexdigest()
        # Also when the cloud was killed after a file and before this.
        if self._put("version", f"{version}\n".encode(), _OPEN):
            _log.info("the broker's files in %s have changed: it must reload them", self._folder)
            return True
        return changed

    def _put(self, name: str, data: bytes, mode: int) -> bool:
        return write_changed(self._folder / name, data, mode=mode)

    def _listed(self) -> set[int] | None:
        """Serial numbers in the list that is there; None: no list of this authority."""
        path = self._folder / "crl.pem"
        if not path.exists():
            return None
        try:
            crl = x509.load_pem_x509_crl(path.read_bytes())
        except ValueError:
            return None
        if crl.issuer != self._authority.certificate.subject:
            return None
        return {each.serial_number for each in crl}

    def _server_lasts(self, now: float) -> bool:
        there = self._authority.lasting(self._folder / "server.pem", now=now)
        if there is None:
            return False
        names = there.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return list(names) == host_names(self._hosts)

    def _server(self, now: float) -> bytes:
        key = new_key()
        certificate = self._authority.server(self._hosts, key.public_key(), now=now)
        return pair_pem(key, certificate)


def access_list(certified: Sequence[Certified], *, now: float) -> str:
    """Mosquitto's access list: the user's name (``%u``) is the certificate's common name.

    A device that has a revoked certificate and none in force is denied everything, because its
    connection may still be open; without one it cannot open another.
    """
    in_force = {c.device for c in certified if c.in_force(now)}
    lines = ["# Written by the cloud: do not change it here."]
    lines += [f"pattern write {topics.ROOT}/+/%u/{kind}" for kind in topics.UP]
    lines += [f"pattern read {topics.ROOT}/+/%u/{kind}" for kind in topics.DOWN]
    lines += [f"user {CLOUD_NAME}"]
    lines += [f"topic read {topics.ROOT}/+/+/{kind}" for kind in topics.UP]
    lines += [f"topic write {topics.ROOT}/+/+/{kind}" for kind in topics.DOWN]
    for device in sorted({c.device for c in certified} - in_force):
        lines += [f"user {device}", "topic deny #"]
    return "\n".join(lines) + "\n"
