"""TUF's network: metadata by name and targets by SHA-256, over the update client's transport."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface

from edge.update.pace import paced
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge.update.transport import Transport

METADATA, TARGETS = "metadata/", "targets/"
"""What addresses begin with. Behind the first is a name, behind the second a SHA-256."""

_NOT_FOUND = 404  # FetcherInterface speaks of HTTP: so does the client of a root that is the newest


class Fetcher(FetcherInterface):
    """Reads what TUF asks for; python-tuf stops at the length that is right or allowed."""

    def __init__(self, *, transport: Transport, monotonic: Callable[[], float]) -> None:
        self._transport = transport
        self._monotonic = monotonic

    def _fetch(self, url: str) -> Iterator[bytes]:
        """The bytes at an address.

        Raises:
            DownloadHTTPError: the cloud does not have it.
            UnavailableError: the cloud does not answer, or is too slow.
        """
        if url.startswith(METADATA):
            pieces = self._transport.read_metadata(url.removeprefix(METADATA))
        else:
            pieces = self._transport.read(url.removeprefix(TARGETS), 0)
        try:
            for piece in paced(pieces, monotonic=self._monotonic):
                yield piece.data
        except InvalidInputError as error:
            raise DownloadHTTPError(str(error), _NOT_FOUND) from error
