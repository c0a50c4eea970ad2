"""The entropy coder: every sequence comes back, near its information content."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.delta import rans
from protos.errors import IntegrityError


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 5)), max_size=1200))
def test_any_sequence_comes_back(pairs: list[tuple[int, int]]) -> None:
    symbols = np.array([s for s, _ in pairs], np.uint8)
    contexts = np.array([c for _, c in pairs], np.uint8)
    assert (rans.unpack(rans.pack(symbols, contexts), symbols.size, contexts) == symbols).all()
    assert (rans.unpack(rans.pack(symbols), symbols.size) == symbols).all()


@pytest.mark.parametrize("share", [0.0, 1e-4, 0.01, 0.3])
def test_a_sequence_costs_about_its_information(share: float) -> None:
    rng = np.random.default_rng(0)
    fours = rng.choice(3, (400_000, 4), p=[1 - share, share / 2, share / 2]).astype(np.uint8)
    symbols = np.bitwise_or.reduce(fours << np.array([0, 2, 4, 6], np.uint8), axis=1)
    counts = np.bincount(symbols) / symbols.size
    bits = -(counts[counts > 0] * np.log2(counts[counts > 0])).sum() * symbols.size
    lanes = symbols.size // 512
    assert len(rans.pack(symbols)) <= 1.01 * bits / 8 + 4 * lanes + 500


def test_contexts_are_worth_what_they_tell() -> None:
    rng = np.random.default_rng(0)
    contexts = rng.integers(0, 2, 100_000).astype(np.uint8)
    symbols = np.where(contexts == 1, 7, rng.integers(0, 2, contexts.size)).astype(np.uint8)
    # Half of the symbols are known from their contexts, the others have one bit.
    assert len(rans.pack(symbols, contexts)) < 100_000 / 2 / 8 + 2000


def test_a_long_sequence_has_the_bytes_that_the_format_says() -> None:
    """Guards the format: another encoder must give, and this one keep, these very bytes."""
    symbols = np.array([3, 3, 3, 0], np.uint8)
    data = rans.pack(symbols)
    assert data[:4] == bytes([1, 0, 1, 0])
    # 3 * 3072 / 4096 and 0 * 1024 / 4096: one lane, coded from the last to the first by hand.
    state = 1 << 16
    for size, before in ((1024, 0), (3072, 1024), (3072, 1024), (3072, 1024)):
        state = (state // size << 12) + state % size + before
    assert data[-4:] == state.to_bytes(4, "little")


@settings(max_examples=300, deadline=None)
@given(
    st.binary(min_size=1, max_size=400),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_an_altered_sequence_is_refused_or_gives_as_many_bytes(
    content: bytes, edits: list[tuple[int, int]]
) -> None:
    data = bytearray(rans.pack(np.frombuffer(content, np.uint8)))
    for place, value in edits:
        data[place % len(data)] = value
    with contextlib.suppress(IntegrityError):
        assert rans.unpack(bytes(data), len(content)).size == len(content)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=80), size=st.integers(0, 5000))
def test_garbage_is_no_sequence(data: bytes, size: int) -> None:
    with pytest.raises(IntegrityError):
        rans.unpack(data, size)
