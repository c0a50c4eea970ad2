"""Make a delta: two files in, their difference out, in two passes and bounded memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge.delta.base import Base
from edge.delta.files import AtomicFile, storage_errors
from edge.delta.format import MAX_REGION, TENSOR, Header, Kind, Operation
from edge.delta.payload import Update, pack_codes, pack_factors, pack_fresh
from edge.student.bundle import sha256_file
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from io import BufferedReader
    from pathlib import Path

    from edge.delta.format import Tensor

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_GROUP = 1 << 20
"""Numbers of factors that are sent together, unless one alone has more."""
_MOST = (1 << 32) - 1
"""Bytes of one operation."""


@dataclass(frozen=True)
class Stretch:
    """Bytes of the target that stand in the base too, perhaps changed, perhaps at another place."""

    target: int
    base: int
    length: int


@dataclass(frozen=True)
class DeltaInfo:
    """What was encoded; digests are lower-case hex, ``size`` is the delta's own, in bytes.

    ``changed_bytes`` are those of the target that neither the base nor its updates give.
    """

    base_sha256: str
    target_sha256: str
    sha256: str
    size: int
    changed_bytes: int


def encode(
    base: Path,
    target: Path,
    out: Path,
    *,
    tensors: Sequence[Tensor] = (),
    updates: Sequence[Update] = (),
    stretches: Sequence[Stretch] | None = None,
    progress: Progress | None = None,
) -> DeltaInfo:
    """Write to ``out`` the delta that turns ``base`` into ``target``.

    Any target can be reached: what base and updates do not give is sent as differences, or as new
    bytes.

    Args:
        base: the file that a device has.
        target: the file that it should have.
        out: where the delta goes; it appears whole or not at all.
        tensors: matrices of codes in the base, in the order of their offsets; their scales tell
            where changes are likely.
        updates: factors that were added to rows of ``tensors``; none for plain differences.
        stretches: where parts of the target stand in the base, in the target's order; None: each
            byte where it is.
        progress: called with bytes of the target done, and its size.

    Raises:
        InvalidInputError: tensors, updates or stretches do not fit the files.
        StorageError: a file cannot be read or written.
    """
    with storage_errors(f"encoding {out} from {base} and {target}"):
        sizes = base.stat().st_size, target.stat().st_size
        if stretches is None:
            stretches = [Stretch(0, 0, min(sizes))]
        _check(sizes, tensors, updates, stretches)
        header = Header(sha256_file(base), sha256_file(target), *sizes, len(tensors))
        with base.open("rb") as old, target.open("rb") as new, AtomicFile(out) as file:
            file.write(header.pack())
            file.write(
                b"".join(
                    TENSOR.pack(t.offset, t.rows, t.columns, t.scales, t.block) for t in tensors
                )
            )
            encoder = _Encoder(file, Base(old, tensors), new, tensors)
            for piece in _pieces(sizes[1], stretches, updates):
                encoder.encode(piece)
                if progress is not None:
                    progress(piece.target + piece.length, sizes[1])
            encoder.finish()
            file.commit()
        size, digest = out.stat().st_size, sha256_file(out)
        return DeltaInfo(
            header.base_sha256, header.target_sha256, digest, size, encoder.changed_bytes
        )


def _check(
    sizes: tuple[int, int],
    tensors: Sequence[Tensor],
    updates: Sequence[Update],
    stretches: Sequence[Stretch],
) -> None:
    """Refuse a plan that does not fit files of these sizes."""
    _in_order("tensors", [(t.offset, t.stop) for t in tensors])
    _in_order("updates", [(u.start, u.stop) for u in updates])
    _in_order("stretches", [(s.target, s.target + s.length) for s in stretches])
    ends = [(s.base + s.length, s.target + s.length) for s in stretches]
    wrong = (
        [t for t in tensors if not t.fits(sizes[0])]
        + [s for s, (b, t) in zip(stretches, ends, strict=True) if b > sizes[0] or t > sizes[1]]
        + [u.tensor for u in updates if u.tensor not in tensors or u.stop > u.tensor.stop]
        + [u.tensor for u in updates if len(u.factors.right) != u.tensor.columns]
        + [u.tensor for u in updates if not any(_holds(s, u) for s in stretches)]
    )
    if wrong:
        msg = f"no delta between files of {sizes[0]} and {sizes[1]} bytes: {wrong[0]} does not fit"
        raise InvalidInputError(msg)


def _holds(stretch: Stretch, update: Update) -> bool:
    return stretch.base <= update.start and update.stop <= stretch.base + stretch.length


def _in_order(what: str, ranges: Sequence[tuple[int, int]]) -> None:
    stops = [0, *(stop for _, stop in ranges)]
    if any(start < before for (start, _), before in zip(ranges, stops, strict=False)):
        msg = f"no delta: {what} overlap or are not in order"
        raise InvalidInputError(msg)


@dataclass(frozen=True)
class _Piece:
    """Bytes of the target; ``base`` None: they are new. ``updates`` are sent before them."""

    target: int
    length: int
    base: int | None = None
    updates: Sequence[Update] = ()


def _pieces(size: int, stretches: Sequence[Stretch], updates: Sequence[Update]) -> Iterator[_Piece]:
    """Cut a target of ``size`` bytes into pieces of at most a region."""
    at = 0
    for stretch in (*stretches, Stretch(size, 0, 0)):
        for start in range(at, stretch.target, MAX_REGION):
            yield _Piece(start, min(MAX_REGION, stretch.target - start))
        groups = _groups([u for u in updates if _holds(stretch, u)])
        stop = stretch.base + stretch.length
        edges = {stretch.base, stop, *groups}
        for low, high in itertools.pairwise(sorted(edges)):
            for start in range(low, high, MAX_REGION):
                place = stretch.target + start - stretch.base
                yield _Piece(place, min(MAX_REGION, high - start), start, groups.get(start, ()))
        at = stretch.target + stretch.length


def _groups(updates: Sequence[Update]) -> dict[int, list[Update]]:
    """Updates that are sent together, by the place of the first; together they code better."""
    groups: dict[int, list[Update]] = {}
    group: list[Update] = []
    room = 0
    for update in updates:
        numbers = update.factors.left.size + update.factors.right.size
        if numbers > room:
            room, group = _GROUP, []
            groups[update.start] = group
        group.append(update)
        room -= numbers
    return groups


class _Encoder:
    """Writes operations; copies that follow each other become one."""

    def __init__(
        self, file: AtomicFile, base: Base, target: BufferedReader, tensors: Sequence[Tensor]
    ) -> None:
        self._file = file
        self._base = base
        self._target = target
        self._tensors = tensors
        self._copy = Operation(Kind.COPY, 0, 0, 0)
        self.changed_bytes = 0

    def encode(self, piece: _Piece) -> None:
        """Write the operations that give a piece."""
        self._target.seek(piece.target)
        block = np.frombuffer(self._target.read(piece.length), np.uint8)
        if block.size != piece.length:
            msg = "a target became shorter while its delta was made: make it again"
            raise InvalidInputError(msg)
        if piece.base is None:
            self._write(Kind.FRESH, piece.length, 0, pack_fresh(block.tobytes()))
            self.changed_bytes += piece.length
            return
        if piece.updates:
            self._write(Kind.FACTORS, 0, 0, pack_factors(piece.updates, self._tensors))
            self._base.add(piece.updates)
        difference = block - self._base.read(piece.base, piece.length)
        changed = difference != 0
        count = int(np.count_nonzero(changed))
        if not count:
            self._add_copy(piece.base, piece.length)
            return
        self.changed_bytes += count
        first, last = int(changed.argmax()), changed.size - int(changed[::-1].argmax())
        self._add_copy(piece.base, first)
        self._changes(piece.base + first, block[first:last], difference[first:last], count)
        self._add_copy(piece.base + last, piece.length - last)

    def _changes(self, start: int, block: Bytes, difference: Bytes, changed: int) -> None:
        contexts, lowest = self._base.contexts(start, block.size, None)
        payload = pack_codes(difference, contexts, lowest)
        if changed > block.size // 2:  # a tensor that was replaced has nothing in common
            fresh = pack_fresh(block.tobytes())
            if len(fresh) < len(payload):
                self._write(Kind.FRESH, block.size, 0, fresh)
                return
        self._write(Kind.CODES, block.size, start, payload)

    def _add_copy(self, base: int, length: int) -> None:
        before = self._copy
        total = before.length + length
        if before.base + before.length == base and total <= _MOST:
            self._copy = replace(before, length=total)
        else:
            self.finish()
            self._copy = Operation(Kind.COPY, length, base, 0)

    def finish(self) -> None:
        """Write the copy that was not written yet."""
        if self._copy.length:
            self._file.write(self._copy.pack())
        self._copy = replace(self._copy, length=0)

    def _write(self, kind: Kind, length: int, base: int, payload: bytes) -> None:
        self.finish()
        self._file.write(Operation(kind, length, base, len(payload)).pack())
        self._file.write(payload)
