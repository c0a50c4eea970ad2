"""Updates in a file of their own, from who makes them to who encodes the delta (NumPy's .npz)."""

from __future__ import annotations

import io
import zipfile
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.delta.files import storage_errors, write_atomic
from edge.delta.format import Tensor
from edge.delta.payload import Update
from edge.delta.product import Factors
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def save_updates(updates: Sequence[Update], path: Path) -> None:
    """Write updates to a file.

    Raises:
        StorageError: the disk is full or failed.
    """
    numbers = [
        (*astuple(u.tensor), u.first, u.factors.power, u.factors.fraction, u.factors.phase)
        for u in updates
    ]
    arrays: dict[str, Any] = {"numbers": np.array(numbers, np.int64).reshape(-1, 9)}
    for n, update in enumerate(updates):
        for name in ("left", "right", "weights"):
            arrays[f"{name}.{n}"] = getattr(update.factors, name)
    made = io.BytesIO()
    np.savez(made, **arrays)
    write_atomic(path, made.getvalue())


def load_updates(path: Path) -> list[Update]:
    """Read what :func:`save_updates` wrote.

    Raises:
        IntegrityError: it is no such file.
        StorageError: it cannot be read.
    """
    try:
        with storage_errors(f"reading {path}"), np.load(path, allow_pickle=False) as arrays:
            return [
                Update(
                    Tensor(*map(int, row[:5])),
                    int(row[5]),
                    Factors(
                        arrays[f"left.{n}"],
                        arrays[f"right.{n}"],
                        arrays[f"weights.{n}"],
                        *map(int, row[6:]),
                    ),
                )
                for n, row in enumerate(arrays["numbers"])
            ]
    except (ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        msg = f"{path} holds no updates ({error}): make them again"
        raise IntegrityError(msg) from error
