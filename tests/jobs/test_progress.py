"""What a job says of how far it is."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from cloud.progress import Progress
from edge.delta.files import AtomicFile
from protos.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def said(path: Path) -> dict[str, Any]:
    note: dict[str, Any] = json.loads(path.read_text())
    return note


def test_seconds_left_follow_the_pace_of_the_phase(tmp_path: Path) -> None:
    now, path = 100.0, tmp_path / "progress.json"
    tell = Progress(path, lambda: now)
    tell("score", 0.0)
    assert said(path) == {"phase": "score", "fraction": 0.0, "seconds": 0.0, "seconds_left": None}
    now += 10
    tell("score", 0.2)
    assert said(path)["seconds_left"] == 40
    tell("learn, step 1", 0.2)
    assert said(path)["seconds_left"] is None  # another phase has another pace
    now += 90
    tell("learn, step 2", 0.5, loss=1.5)
    assert said(path) == {
        "phase": "learn, step 2",
        "fraction": 0.5,
        "seconds": 100.0,
        "seconds_left": 150.0,
        "loss": 1.5,
    }


def test_a_full_disk_is_said_once_and_again_only_after_it_was_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tell, path = Progress(tmp_path / "progress.json", lambda: 0.0), tmp_path / "progress.json"

    def full(*_: object) -> None:
        msg = "No space left on device"
        raise StorageError(msg)

    tell("learn", 0.1)
    for count in (1, 2):
        with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
            patched.setattr(AtomicFile, "write", full)
            tell("learn", 0.2)
            tell("learn", 0.3)
        assert caplog.text.count("progress is not written") == count
        assert said(path)["fraction"] != 0.3
        tell("learn", 0.4)
        assert said(path)["fraction"] == 0.4
