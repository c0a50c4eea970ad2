"""How far a job is, for those who watch it."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from edge.delta.files import write_atomic
from protos.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("anabranch.adapt")


class Progress:
    """Writes ``progress.json``: phase, fraction done (0..1) and seconds left.

    Seconds left are what the phase's pace so far comes to. A full disk is said in the log, once.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._began = clock()
        self._phase, self._since = "", (0.0, 0.0)
        self._failing = False

    def __call__(self, phase: str, fraction: float, **more: float) -> None:
        """Write how far the job is."""
        spent = self._clock() - self._began
        kind, _, _ = phase.partition(",")
        if kind != self._phase:
            # A job that goes on begins in the middle, and phases differ in pace.
            self._phase, self._since = kind, (spent, fraction)
        done = fraction - self._since[1]
        left = (spent - self._since[0]) * (1 - fraction) / done if done > 0 else None
        note = {"phase": phase, "fraction": round(fraction, 4), "seconds": round(spent, 1)}
        note["seconds_left"] = None if left is None else round(left, 1)
        try:
            write_atomic(self._path, json.dumps(note | more).encode())
        except StorageError as error:  # who watches sees nothing new; what is learnt goes on
            if not self._failing:
                log.warning("progress is not written: %s", error)
            self._failing = True
        else:
            self._failing = False
