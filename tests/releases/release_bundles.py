"""Bundles to publish."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from protos.harness import Harness

if TYPE_CHECKING:
    from pathlib import Path


def write_bundle(
    folder: Path, *, seed: int = 0, changed: int = 0, system: str = "Be brief."
) -> Path:
    """Write a bundle: random codes, of which ``changed`` differ from those of the same seed."""
    folder.mkdir(parents=True)
    codes = np.random.default_rng(seed).integers(0, 255, 200_000).astype(np.uint8)
    codes[:: codes.size // changed if changed else codes.size + 1] += 1
    (folder / "weights.bin").write_bytes(codes.tobytes())
    (folder / "graph.onnx").write_bytes(b"graph")
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "student.json").write_bytes(b'{"layers": 1}')
    (folder / "harness.json").write_bytes(Harness(system=system).to_json())
    return folder
