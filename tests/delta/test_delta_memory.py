"""Memory of the codec: bounded whatever files and deltas say, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zstandard

from edge import delta
from edge.delta import format as anbd
from edge.delta import rans
from edge.delta.format import Kind

if TYPE_CHECKING:
    from pathlib import Path

    from tests.delta import delta_cases as cases
else:
    import delta_cases as cases

BOUND = 32 << 10
"""KiB over an idle process."""

_SCRIPT = """
import resource, sys
from pathlib import Path
from edge import delta
from protos.errors import AnabranchError
folder, *names = map(Path, sys.argv[1:])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
delta.apply(folder / "small.base", folder / "small.delta", folder / "small.out", fsync=False)
idle = peak()
for name in names:
    try:
        delta.apply(folder / "base", name, folder / "out", fsync=False)
    except AnabranchError as error:
        print(error, file=sys.stderr)
print(peak() - idle)
"""


def peak_of(folder: Path, *deltas: Path) -> tuple[int, str]:
    """KiB that applying deltas takes over an idle process, and the errors."""
    if not (folder / "small.base").exists():
        small = cases.codes(0, 3000)
        small.tofile(folder / "small.base")
        cases.nudged(small, 1, 0.1).tofile(folder / "small.target")
        delta.encode(*(folder / f"small.{n}" for n in ("base", "target", "delta")))
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder), *map(str, deltas)],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout), done.stderr


@pytest.fixture
def big(tmp_path: Path) -> cases.Case:
    """A tensor of 24 MiB with changes and factors."""
    rows, columns = 24576, 1024
    scales = np.random.default_rng(0).uniform(0.002, 0.02, rows * columns // 32).astype("<f4")
    base = np.concatenate([cases.codes(5, rows * columns), scales.view(np.uint8)])
    tensor = delta.Tensor(0, rows, columns, rows * columns, 32)
    rng = np.random.default_rng(1)
    left, right = (rng.integers(-127, 128, (n, 64)).astype(np.int8) for n in (rows, columns))
    some = delta.Factors.of(left, right, np.full(64, 1e-9), 0.002)
    target = base.copy()
    target[: tensor.size] = cases.nudged(base[: tensor.size], 6, 0.15)
    return cases.Case.of(
        tmp_path, base, target, tensors=[tensor], updates=[delta.Update(tensor, 0, some)]
    )


def test_a_large_delta_takes_bounded_memory(big: cases.Case, tmp_path: Path) -> None:
    peak, errors = peak_of(tmp_path, big.made)
    assert not errors
    assert (tmp_path / "out").read_bytes() == big.target.read_bytes()
    assert peak < BOUND


def test_altered_deltas_take_bounded_memory(big: cases.Case, tmp_path: Path) -> None:
    data = big.made.read_bytes()
    names = []
    for n, altered in enumerate(cases.corpus(data, seed=1, count=12)):
        names.append(tmp_path / f"altered-{n}")
        names[-1].write_bytes(altered)
    peak, errors = peak_of(tmp_path, *names)
    assert errors
    assert peak < BOUND


def test_bombs_are_not_unpacked(big: cases.Case, tmp_path: Path) -> None:
    """Frames of 256 MiB of zeros in every place that takes a frame."""
    bomb = zstandard.ZstdCompressor().compress(bytes(256 << 20))
    header = delta.read_header(big.made)
    head = anbd.Header(
        header.base_sha256, header.target_sha256, header.base_size, header.target_size, 0
    ).pack()
    symbols = rans.pack(np.zeros(10, np.uint8))
    at = symbols.index(b"\x28\xb5\x2f\xfd")  # a frame's magic: that of the tables
    sequence = symbols[:4] + len(bomb).to_bytes(4, "little") + symbols[8:at] + bomb + bytes(8)
    codes = len(sequence).to_bytes(4, "little") + bytes(8) + sequence
    names = []
    for kind, payload in ((Kind.FRESH, bomb), (Kind.CODES, codes)):
        names.append(tmp_path / kind.name)
        operation = anbd.OPERATION.pack(kind, 40, 0, len(payload), 0)
        names[-1].write_bytes(head + operation + payload)
    peak, errors = peak_of(tmp_path, *names)
    assert errors.count("delta:") == len(names)
    assert peak < BOUND
