"""A release store on a real folder and database, and bundles to publish."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from cloud.db import open_database
from cloud.releases.keys import open_keys
from cloud.releases.store import ReleaseStore
from protos.harness import Harness

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Engine

    from cloud.releases.keys import Signer


@pytest.fixture
def make_bundle(tmp_path: Path) -> Callable[..., Path]:
    """Write a bundle: random codes, of which ``changed`` differ from those of the same seed."""

    def make(name: str, *, seed: int = 0, changed: int = 0, system: str = "Be brief.") -> Path:
        folder = tmp_path / "bundles" / name
        folder.mkdir(parents=True)
        codes = np.random.default_rng(seed).integers(0, 255, 200_000).astype(np.uint8)
        codes[:: codes.size // changed if changed else codes.size + 1] += 1
        (folder / "weights.bin").write_bytes(codes.tobytes())
        (folder / "graph.onnx").write_bytes(b"graph")
        (folder / "tokenizer.json").write_bytes(b"{}")
        (folder / "student.json").write_bytes(b'{"layers": 1}')
        (folder / "harness.json").write_bytes(Harness(system=system).to_json())
        return folder

    return make


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """The database in the cloud's state folder."""
    (tmp_path / "state").mkdir()
    return open_database(tmp_path / "state" / "cloud.db")


@pytest.fixture
def open_store(tmp_path: Path, engine: Engine) -> Callable[..., ReleaseStore]:
    """Open the store of the state folder, as a new process would."""

    def open_(
        *, signer: Signer | None = None, registry: CollectorRegistry | None = None
    ) -> ReleaseStore:
        return ReleaseStore(
            folder=tmp_path / "state",
            engine=engine,
            signer=signer or open_keys(tmp_path / "state" / "keys"),
            clock=lambda: 1_700_000_000.5,
            registry=registry or CollectorRegistry(),
        )

    return open_
