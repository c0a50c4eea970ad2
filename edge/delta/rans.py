"""An entropy coder of bytes: interleaved rANS, in integers only, vectorised over its lanes.

Range asymmetric numeral systems (Duda, arXiv 1311.2540) with 12-bit frequencies, 32-bit states and
16-bit words. Symbol ``i`` belongs to lane ``i mod lanes``; all lanes take one step together, and
those that run low read their words from one common sequence in the order of the lanes (Giesen,
arXiv 1402.3392). Each symbol has a context that the decoder knows beforehand; a context has its own
frequencies, which travel with the symbols.

A packed sequence, little-endian::

    lanes u16 | contexts u16 | size of the tables u32 | words u32
    | tables: zstd of the frequencies, u16 [contexts, 256], each row's sum is 4096
    | states u32 [lanes] | words u16 [words]

Nothing is in floating point, and the frequencies are those that were sent: every platform decodes
the same bytes. A sequence that was altered is refused or gives other bytes, never more memory: the
caller says how many symbols there are.
"""

from __future__ import annotations

import struct
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import zstandard

from protos.errors import IntegrityError

Bytes = npt.NDArray[np.uint8]
Contexts = npt.NDArray[np.uint8]

BITS = 12
MAX_CONTEXTS = 256
_TOTAL = 1 << BITS
_LOW = 1 << 16
"""A state below it takes a word."""
_MAX_LANES = 4096
_SYMBOLS_A_LANE = 512
"""A lane costs two bytes beyond the content of its symbols, and lanes make speed."""
_HEAD = struct.Struct("<HHII")


def pack(symbols: Bytes, contexts: Contexts | None = None) -> bytes:
    """Code bytes near their information content in each context.

    Args:
        symbols: what to code, [n].
        contexts: the context of each symbol, [n], each below 256; None: all have one.
    """
    if contexts is None:
        contexts = np.zeros(symbols.size, np.uint8)
    count = int(contexts.max(initial=0)) + 1
    pairs = np.left_shift(contexts, 8, dtype=np.uint32) | symbols
    counts = np.bincount(pairs, minlength=count << 8).reshape(count, 256)
    frequencies = np.stack([_frequencies(row) for row in counts])
    states, words = _encode(pairs, frequencies, _lanes(symbols.size))
    tables = zstandard.ZstdCompressor(level=19).compress(frequencies.astype("<u2").tobytes())
    head = _HEAD.pack(states.size, count, len(tables), words.size)
    return head + tables + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def unpack(data: bytes, size: int, contexts: Contexts | None = None) -> Bytes:
    """Decode ``size`` bytes that :func:`pack` coded in the same contexts.

    Raises:
        IntegrityError: this is no packed sequence of so many symbols.
    """
    if len(data) < _HEAD.size:
        _refuse("it ends within its head")
    lanes, count, table_size, words_size = _HEAD.unpack_from(data)
    start = _HEAD.size + table_size
    if not (
        lanes == _lanes(size)
        and 0 < count <= MAX_CONTEXTS
        and len(data) == start + 4 * lanes + 2 * words_size
        and words_size <= size + lanes
    ):
        _refuse("its sizes do not fit its content")
    frequencies = _read_tables(data[_HEAD.size : start], count)
    if contexts is not None and int(contexts.max(initial=0)) >= count:
        _refuse("a context has no table")
    states = np.frombuffer(data, "<u4", lanes, start).astype(np.uint32)
    words = np.frombuffer(data, "<u2", words_size, start + 4 * lanes).astype(np.uint32)
    return _decode(states, words, frequencies, size, contexts)


def _lanes(size: int) -> int:
    return min(max(size // _SYMBOLS_A_LANE, 1), _MAX_LANES)


def _refuse(why: str) -> NoReturn:
    msg = f"delta: a coded sequence is damaged: {why}; fetch the delta again"
    raise IntegrityError(msg)


def _frequencies(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Counts scaled to a sum of 4096, at least 1 for what occurs."""
    total = int(counts.sum())
    if not total:
        counts = np.eye(1, 256, dtype=np.int64)[0]
        total = 1
    found: npt.NDArray[np.int64] = np.where(counts > 0, np.maximum(counts * _TOTAL // total, 1), 0)
    while excess := int(found.sum()) - _TOTAL:
        # Take from, or give to, the most frequent ones: there it costs the least.
        if excess < 0:
            found[int(counts.argmax())] -= excess
        else:
            most = int(found.argmax())
            found[most] -= min(excess, int(found[most]) // 2)
    return found


def _encode(
    pairs: npt.NDArray[np.uint32], frequencies: npt.NDArray[np.int64], lanes: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """States and words, in the order in which a decoder needs them."""
    size = frequencies.astype(np.uint64).ravel()
    before = (np.cumsum(frequencies, axis=1) - frequencies).astype(np.uint64).ravel()
    states = np.full(lanes, _LOW, np.uint64)
    words = []
    for start in reversed(range(0, pairs.size, lanes)):
        step = pairs[start : start + lanes]
        state, part = states[: step.size], size[step]
        full = state >= part << np.uint64(32 - BITS)
        words.append(state[full] & np.uint64(_LOW - 1))
        state[full] >>= np.uint64(16)
        quotient, rest = np.divmod(state, part)
        states[: step.size] = (quotient << np.uint64(BITS)) + rest + before[step]
    return states, np.concatenate([*reversed(words), np.empty(0, np.uint64)])


def _read_tables(data: bytes, count: int) -> npt.NDArray[np.uint32]:
    try:
        if zstandard.frame_content_size(data) != count * 512:
            _refuse("its tables have another size")
        raw = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=count * 512, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        _refuse(f"its tables do not decompress ({error})")
    frequencies = np.frombuffer(raw, "<u2").reshape(count, 256).astype(np.uint32)
    if (frequencies.sum(axis=1) != _TOTAL).any():
        _refuse("its frequencies do not add up")
    return frequencies


def _decode(
    states: npt.NDArray[np.uint32],
    words: npt.NDArray[np.uint32],
    frequencies: npt.NDArray[np.uint32],
    size: int,
    contexts: Contexts | None,
) -> Bytes:
    slots = _slots(frequencies)
    out = np.empty(size, np.uint8)
    taken = 0
    for start in range(0, size, states.size):
        stop = min(start + states.size, size)
        state = states[: stop - start]
        slot = state & np.uint32(_TOTAL - 1)
        if contexts is not None:
            slot |= np.left_shift(contexts[start:stop], BITS, dtype=np.uint32)
        entry = slots.take(slot)
        out[start:stop] = entry  # its lowest byte is the symbol
        state >>= np.uint32(BITS)
        state *= (entry >> np.uint32(20)) + np.uint32(1)
        state += (entry >> np.uint32(8)) & np.uint32(_TOTAL - 1)
        low = (state < _LOW).nonzero()[0]
        read = words[taken : taken + low.size]
        if read.size < low.size:
            _refuse("it ends too early")
        taken += low.size
        state[low] = state[low] << np.uint32(16) | read
    if taken != words.size or (states != _LOW).any():
        _refuse("it does not end where it should")
    return out


def _slots(frequencies: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """For each context and slot, in one integer: frequency - 1, slot - start, and symbol."""
    count = len(frequencies)
    flat = frequencies.ravel()
    owner = np.repeat(np.arange(flat.size, dtype=np.uint32), flat)
    before = (np.cumsum(frequencies, axis=1) - frequencies).astype(np.uint32).ravel()
    slot = np.tile(np.arange(_TOTAL, dtype=np.uint32), count)
    entry: npt.NDArray[np.uint32] = (
        (flat[owner] - np.uint32(1)) << np.uint32(20)
        | (slot - before[owner]) << np.uint32(8)
        | (owner & np.uint32(255))
    )
    return entry
