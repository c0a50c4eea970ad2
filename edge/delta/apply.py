"""Apply a delta: verify the base, write the target beside it, verify, and only then name it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO

from edge.delta.base import Base
from edge.delta.files import AtomicFile, storage_errors
from edge.delta.format import Header, Kind, Operation, take, take_header, take_tensors
from edge.delta.payload import lowest_of, unpack_codes, unpack_factors, unpack_fresh
from edge.student.bundle import sha256_file
from protos.errors import IntegrityError, WrongBaseError

if TYPE_CHECKING:
    from pathlib import Path

    from edge.delta.format import Tensor

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_BLOCK = 1 << 20


def apply(
    base: Path,
    delta: Path,
    out: Path,
    *,
    progress: Progress | None = None,
    fsync: bool = True,
) -> None:
    """Make ``out`` from ``base`` and ``delta``; memory stays under 32 MB whatever they say.

    ``out`` appears only when its SHA-256 is the one that the delta names. Whether that is the one
    that a release names is the caller's to check (:func:`read_header`).

    A process that is killed leaves ``out`` with the suffix ``.tmp``: the next call goes on from
    there. What it left is hashed with the rest. When that does not give the target (another delta
    left it, or a power loss took bytes that were never on the disk), all is made again.

    Args:
        base: the file that the delta was made from.
        delta: an ANBD file.
        out: the file to make; it may exist and is then replaced.
        progress: called with bytes of the target written, and its size.
        fsync: whether ``out`` is durable on return.

    Raises:
        WrongBaseError: ``base`` is another file: fetch the full file.
        IntegrityError: the delta is malformed, truncated, or does not give what it says.
        StorageError: the disk is full or failed.
    """
    with storage_errors(f"applying {delta} to {base}"), ExitStack() as open_files:
        changes = open_files.enter_context(delta.open("rb"))
        header = take_header(changes)
        tensors = take_tensors(changes, header)
        _check_base(base, header)
        old = open_files.enter_context(base.open("rb"))
        new = open_files.enter_context(AtomicFile(out, fsync=fsync, resume=True))
        target = _Target(new, header.target_size, progress)
        first, resumed = changes.tell(), target.written
        _make(header, Base(old, tensors), tensors, changes, target)
        if resumed and target.sha256 != header.target_sha256:
            target.cut(0)
            changes.seek(first)
            _make(header, Base(old, tensors), tensors, changes, target)
        if target.sha256 != header.target_sha256:
            msg = (
                f"delta: it gives a file with SHA-256 {target.sha256}, not the stated "
                f"{header.target_sha256}; fetch the delta again or the full file"
            )
            raise IntegrityError(msg)
        new.commit()


def _check_base(base: Path, header: Header) -> None:
    size = base.stat().st_size
    found = sha256_file(base) if size == header.base_size else f"a file of {size} bytes"
    if found != header.base_sha256:
        msg = (
            f"delta: made for the file {header.base_sha256} of {header.base_size} bytes, but "
            f"{base} is {found}; fetch the full file"
        )
        raise WrongBaseError(msg)


def _make(
    header: Header, base: Base, tensors: list[Tensor], changes: BinaryIO, target: _Target
) -> None:
    """Carry out the operations from where ``target`` ends."""
    made = 0
    factors: bytes | None = None
    while made < header.target_size:
        operation = Operation.take(changes, made=made, header=header)
        payload = take(changes, operation.payload, f"an operation at byte {made} of the target")
        if operation.kind is Kind.FACTORS:
            factors = payload  # decoded only where it is needed
        elif made + operation.length > target.written:
            if factors is not None:
                base.add(unpack_factors(factors, tensors))
                factors = None
            if operation.kind is Kind.COPY:
                _copy(operation, base, target, max(target.written - made, 0))
            else:
                target.cut(made)
                target.write(_made(operation, payload, base))
        made += operation.length
    if changes.read(1):
        msg = "delta: it goes on after its last operation; fetch the delta again"
        raise IntegrityError(msg)


def _copy(operation: Operation, base: Base, target: _Target, skip: int) -> None:
    for start in range(skip, operation.length, _BLOCK):
        size = min(_BLOCK, operation.length - start)
        target.write(base.read(operation.base + start, size).data)


def _made(operation: Operation, payload: bytes, base: Base) -> memoryview | bytes:
    if operation.kind is Kind.FRESH:
        return unpack_fresh(payload, operation.length)
    contexts, _ = base.contexts(operation.base, operation.length, lowest_of(payload))
    difference = unpack_codes(payload, operation.length, contexts)
    difference += base.read(operation.base, operation.length)
    return difference.data


class _Target:
    """The file that is made: it may have a beginning already, which is hashed with the rest."""

    def __init__(self, file: AtomicFile, size: int, progress: Progress | None) -> None:
        self._file = file
        self._size = size
        self._progress = progress
        self._hash: hashlib._Hash | None = None
        self.written = file.size
        if self.written > size:
            self.cut(0)

    def cut(self, size: int) -> None:
        """Forget what there is after ``size`` bytes."""
        if size != self.written:
            self._file.truncate(size)
            self._hash, self.written = None, size

    def write(self, data: memoryview | bytes) -> None:
        """Append to the file and to its hash."""
        digest = self._hashed()
        self._file.write(data)
        digest.update(data)
        self.written += len(data)
        if self._progress is not None:
            self._progress(self.written, self._size)

    @property
    def sha256(self) -> str:
        """Of all that there is."""
        return self._hashed().hexdigest()

    def _hashed(self) -> hashlib._Hash:
        if self._hash is None:
            self._hash = hashlib.sha256()
            for block in self._file.read():
                self._hash.update(block)
        return self._hash
