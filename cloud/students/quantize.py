"""Eight-bit codes with scales that are frozen for the life of a base.

A weight matrix ``[rows, columns]`` is cut into blocks of 64 along its columns; a block has one
fp32 scale, ``max |w| / 127``, and its codes are ``round(w / scale) + 128`` as unsigned bytes,
which is what ONNX Runtime's ``MatMulNBits`` reads with its default zero point. Later releases keep
the scales and change codes only, so that a delta is a change of bytes.

Training must go on from fp32 masters, never from codes: from the middle of a cell every change of
less than half a step would round away, and that is where a skill lives (docs/adr/0003).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from protos.errors import InvalidInputError

BLOCK = 64
ZERO = 128
_LIMIT = 127

Codes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float32]


def make_scales(weight: Weights, block: int = BLOCK) -> Scales:
    """One scale a block: ``[rows, columns]`` to ``[rows, columns / block]``.

    Raises:
        InvalidInputError: the columns are no multiple of ``block``, or a weight is not finite.
    """
    rows, columns = weight.shape
    if columns % block:
        msg = f"a matrix of {columns} columns cannot be cut into blocks of {block}"
        raise InvalidInputError(msg)
    peak = np.abs(weight).reshape(rows, columns // block, block).max(axis=2)
    if not np.isfinite(peak).all():
        msg = "a weight is not finite: the model cannot be quantized"
        raise InvalidInputError(msg)
    # A block of zeros still needs a scale that can be divided by, and that later changes can use.
    return np.where(peak > 0, peak / _LIMIT, np.float32(1e-8)).astype(np.float32)


def encode(weight: Weights, scales: Scales) -> Codes:
    """Round weights ``[rows, columns]`` to codes on given scales, to nearest, within -127..127.

    >>> w = np.array([[1.0] + [0.0] * 62 + [-1.0]], dtype=np.float32)
    >>> encode(w, make_scales(w))[0, [0, 1, 63]].tolist()
    [255, 128, 1]
    """
    codes = np.clip(np.rint(in_steps(weight, scales)), -_LIMIT, _LIMIT) + ZERO
    result: Codes = codes.astype(np.uint8)
    return result


def in_steps(weight: Weights, scales: Scales) -> Weights:
    """Weights ``[rows, columns]`` in steps of their scales: codes before rounding, around zero."""
    steps: Weights = weight.reshape(len(weight), scales.shape[1], -1) / scales[:, :, None]
    return steps.reshape(weight.shape)


def decode(codes: Codes, scales: Scales) -> Weights:
    """Weights ``[rows, columns]`` that codes stand for."""
    rows, columns = codes.shape
    steps = codes.reshape(rows, scales.shape[1], -1).astype(np.float32) - ZERO
    weights: Weights = (steps * scales[:, :, None]).reshape(rows, columns)
    return weights
