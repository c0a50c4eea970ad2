"""What the update client needs of the cloud."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from protos.v1 import fleet_pb2


@dataclass(frozen=True)
class Piece:
    """Bytes of a file from ``offset`` on; ``size`` is the whole file's."""

    offset: int
    data: bytes
    size: int


class Transport(Protocol):
    """The ``Fleet`` service of ``protos/v1/fleet.proto``, seen from one device.

    Every call raises :class:`UnavailableError` when trying later may help, and
    :class:`InvalidInputError` when the cloud does not have what was asked for.
    """

    def watch(self, *, student: str, release: int) -> Iterator[int]:
        """Versions that this device should run, now and whenever that changes; 0: nothing to do.

        Args:
            student: digest of the student in service.
            release: its version.
        """
        ...

    def read_metadata(self, name: str) -> Iterator[Piece]:
        """All bytes of signed metadata: ``timestamp.json``, ``3.root.json``, ``7.targets.json``."""
        ...

    def read(self, sha256: str, offset: int) -> Iterator[Piece]:
        """Bytes of a manifest, file or delta from ``offset`` on; may end before the file does."""
        ...

    def report(self, report: fleet_pb2.UpdateReport) -> None:
        """Say how an update goes; channel and device are filled in."""
        ...

    def close(self) -> None:
        """End every call in progress, from any thread: they raise UnavailableError."""
        ...
