"""How slow the cloud may be: TUF's slow retrieval attack, and lines that only drip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from edge.update.transport import Piece

GRACE_S = 30.0
"""Seconds that any read may take, however little comes."""

MIN_BYTES_PER_S = 256
"""Bytes a second, on average after the grace; the slowest mobile line has several times that."""


def paced(pieces: Iterable[Piece], *, monotonic: Callable[[], float]) -> Iterator[Piece]:
    """The same pieces, for as long as they come fast enough.

    A read from which nothing comes at all is bounded by its transport's deadline.

    Args:
        pieces: of one read.
        monotonic: seconds.

    Raises:
        UnavailableError: they come slower than :data:`MIN_BYTES_PER_S`; what came is right to keep.
    """
    began, got = monotonic(), 0
    for piece in pieces:
        got += len(piece.data)
        seconds = monotonic() - began
        if seconds > GRACE_S + got / MIN_BYTES_PER_S:
            msg = (
                f"the cloud sent {got} bytes in {seconds:.0f} s, slower than {MIN_BYTES_PER_S} "
                "bytes a second: the line or somebody on it holds it up; asking again later"
            )
            raise UnavailableError(msg)
        yield piece
