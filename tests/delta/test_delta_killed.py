"""A delta whose application is killed: the next call goes on, and the file is right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edge import delta
from edge.delta.files import TEMPORARY
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.delta import delta_cases as cases
else:
    import delta_cases as cases


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> cases.Case:
    return cases.full(tmp_path_factory.mktemp("kept"))


def test_it_goes_on_from_every_byte(kept: cases.Case, tmp_path: Path) -> None:
    target = kept.target.read_bytes()
    ends = np.cumsum([o.length for _, o in cases.operations(kept.made.read_bytes())])
    cuts = {int(e) + shift for e in (0, *ends) for shift in (-1, 0, 1)}
    cuts |= set(np.random.default_rng(0).integers(0, len(target), 40).tolist())
    for cut in sorted(c for c in cuts if 0 <= c <= len(target)):
        (tmp_path / f"out{TEMPORARY}").write_bytes(target[:cut])
        delta.apply(kept.base, kept.made, tmp_path / "out", fsync=False)
        assert (tmp_path / "out").read_bytes() == target
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_there_is_not_written_again(kept: cases.Case, tmp_path: Path) -> None:
    target = kept.target.read_bytes()
    (tmp_path / f"out{TEMPORARY}").write_bytes(target[:-100])
    seen: list[int] = []
    delta.apply(kept.base, kept.made, tmp_path / "out", progress=lambda done, _: seen.append(done))
    assert seen == [len(target)]


@pytest.mark.parametrize("left", ["zeros", "other", "longer"])
def test_a_wrong_beginning_is_made_again(kept: cases.Case, tmp_path: Path, left: str) -> None:
    """After a power loss a file may have its length and not its bytes."""
    target = kept.target.read_bytes()
    beginning = {"zeros": bytes(4000), "other": b"x" * 50, "longer": target + b"more"}[left]
    (tmp_path / f"out{TEMPORARY}").write_bytes(beginning)
    delta.apply(kept.base, kept.made, tmp_path / "out", fsync=False)
    assert (tmp_path / "out").read_bytes() == target


def test_a_damaged_delta_is_refused_after_a_right_beginning_too(
    kept: cases.Case, tmp_path: Path
) -> None:
    data = bytearray(kept.made.read_bytes())
    at, fresh = cases.operations(bytes(data))[-2]
    data[at + fresh.payload] ^= 1
    (tmp_path / "bad").write_bytes(data)
    (tmp_path / f"out{TEMPORARY}").write_bytes(kept.target.read_bytes()[:3000])
    with pytest.raises(IntegrityError):
        delta.apply(kept.base, tmp_path / "bad", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


_SCRIPT = """
import sys
from pathlib import Path
from edge import delta
print("ready", flush=True)
delta.apply(*map(Path, sys.argv[1:]))
print("done", flush=True)
"""


def test_a_process_killed_at_any_moment_is_gone_on_with(tmp_path: Path) -> None:
    base = cases.codes(0, 12 << 20)
    case = cases.Case.of(tmp_path, base, cases.nudged(base, 1, 0.2))
    target, out = case.target.read_bytes(), tmp_path / "out"
    left = tmp_path / f"out{TEMPORARY}"
    rng = np.random.default_rng(0)
    killed_within = 0
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, str(case.base), str(case.made), str(out)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        aim = int(rng.integers(1, len(target)))
        # The moment is when so many bytes are there: a machine's speed does not decide it.
        while process.poll() is None and not (left.exists() and left.stat().st_size >= aim):
            time.sleep(0.0005)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if left.exists():
            killed_within += 1
            assert target.startswith(left.read_bytes())
            assert not out.exists()
            if rng.random() < 0.5:
                delta.apply(case.base, case.made, out, fsync=False)
        if out.exists():
            assert out.read_bytes() == target
            out.unlink()
    assert killed_within
    delta.apply(case.base, case.made, out, fsync=False)
    assert out.read_bytes() == target
