"""A driver that is killed at any of its writes goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).with_name("rollout_killed.py")
MEMORY = Path("/dev/shm")  # noqa: S108 - SIGKILL loses nothing there, and flushing costs nothing


def test_a_driver_killed_at_any_write_comes_to_the_same_end(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as folder:
        done = subprocess.run(
            [sys.executable, SCRIPT, folder], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    note = json.loads(done.stdout)
    assert note["end"]["home"]["rollout"][:2] == [4, "done"]
    assert set(note["kills"]) == {"CREATE", "INSERT", "UPDATE", "COMMIT", "answer"}
    assert sum(note["kills"].values()) > 100
