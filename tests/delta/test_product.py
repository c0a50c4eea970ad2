"""Low-rank products: the integers of the specification, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge import delta
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.delta import delta_cases as cases
else:
    import delta_cases as cases


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), first=st.integers(0, 80), rank=st.integers(1, 12))
def test_codes_are_those_of_plain_integers(seed: int, first: int, rank: int) -> None:
    base = cases.weights(seed)
    update = delta.Update(cases.TENSOR_AT_0, first, cases.factors(seed, 16, rank))
    found = base.copy()
    scales = base[cases.SCALES :][: cases.SCALES // 8].view("<u4").reshape(cases.ROWS, -1)
    rows = found[update.start : update.stop].reshape(-1, cases.COLUMNS)
    delta.Product(update.factors, cases.BLOCK).add(
        rows, scales[first : first + 16].astype(np.uint32), 0
    )
    assert (found == cases.added(base, update)).all()
    assert (found != base).any()


def test_rows_come_out_the_same_alone_and_together() -> None:
    update = cases.factors(1)
    base = cases.codes(2, cases.SCALES).reshape(cases.ROWS, cases.COLUMNS)
    scales = np.full((cases.ROWS, 2), 0.01, np.float32).view(np.uint32)
    together, alone = base.copy(), base.copy()
    product = delta.Product(update, cases.BLOCK)
    product.add(together, scales, 0)
    for row in range(cases.ROWS):
        product.add(alone[row : row + 1], scales[row : row + 1], row)
    assert (together == alone).all()


def test_a_tenth_of_a_step_moves_one_code_in_ten() -> None:
    """What rounding to nearest would lose, the dither keeps."""
    left, right = np.full((256, 1), 100, np.int8), np.full((256, 1), 100, np.int8)
    some = delta.Factors.of(left, right, np.array([0.1 * 0.01 / 1e4]), 0.01)
    codes = np.full((256, 256), 128, np.uint8)
    delta.Product(some, cases.BLOCK).add(
        codes, np.full((256, 8), 0.01, np.float32).view(np.uint32), 0
    )
    assert set(np.unique(codes)) == {128, 129}
    assert 0.098 < (codes == 129).mean() < 0.102
    assert np.abs((codes == 129).reshape(16, 16, 16, 16).mean(axis=(1, 3)) - 0.1).max() < 0.04


def test_codes_saturate() -> None:
    left, right = np.full((2, 1), 127, np.int8), np.full((32, 1), 127, np.int8)
    left[1] = -127
    some = delta.Factors.of(left, right, np.array([1.0]), 0.01)
    codes = np.full((2, 32), 128, np.uint8)
    delta.Product(some, cases.BLOCK).add(
        codes, np.full((2, 1), 0.01, np.float32).view(np.uint32), 0
    )
    assert codes.tolist() == [[255] * 32, [1] * 32]


def test_an_update_that_only_factors_give_needs_no_differences(tmp_path: Path) -> None:
    base = cases.weights(0)
    update = delta.Update(cases.TENSOR_AT_0, 7, cases.factors(1, 80))
    case = cases.Case.of(
        tmp_path, base, cases.added(base, update), tensors=[cases.TENSOR_AT_0], updates=[update]
    )
    info = delta.encode(
        case.base, case.target, case.made, tensors=[cases.TENSOR_AT_0], updates=[update]
    )
    assert info.changed_bytes == 0
    delta.apply(case.base, case.made, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == case.target.read_bytes()


@pytest.mark.parametrize("scale", [0.0, -0.01, np.inf, np.nan, 1e-40])
def test_scales_that_are_none_are_refused(scale: float) -> None:
    codes = np.full((1, 64), 128, np.uint8)
    scales = np.array([[0.01, scale]], np.float32).view(np.uint32)
    with pytest.raises(IntegrityError, match="scales"):
        delta.Product(cases.factors(0, 1), cases.BLOCK).add(codes, scales, 0)


def test_factors_out_of_bounds_are_refused() -> None:
    some = cases.factors(0)
    for changes in (
        {"fraction": 61},
        {"fraction": 15},
        {"phase": 1 << 16},
        {"phase": -1},
        {"weights": np.empty(0, np.uint16)},
        {"left": some.left[:, :4]},
        {"right": some.right[:0]},
    ):
        numbers = {k: getattr(some, k) for k in some.__dataclass_fields__} | changes
        with pytest.raises(IntegrityError, match="out of bounds"):
            delta.Factors(**numbers)
    many = np.full((1, 1000), 127, np.int8)
    with pytest.raises(InvalidInputError, match="product"):
        delta.Factors.of(many, many, np.ones(1000), 1e-9)
