"""Where a job goes on after SIGKILL: its weights, its optimizer and its dice, on disk.

Two files in the job's folder. ``scores.pt`` holds what was scored before the first step;
``checkpoint.pt`` the state after some step. Each is written whole or not at all, and carries a key
of what it was made for: under another key it is not read.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from cloud.learners.targets import Target
from edge.delta.files import TEMPORARY, AtomicFile
from protos.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

log = logging.getLogger("anabranch.learners")

_SCORES, _STATE = "scores.pt", "checkpoint.pt"
_FORMAT = 2
"""Part of every key. Format 1 had neither seconds nor lessons seen."""


def key_of(what: object, *weights: Mapping[str, torch.Tensor]) -> str:
    """Names a result by what decides it: ``what`` by its ``repr``, ``weights`` by their bytes."""
    named = hashlib.sha256(repr((_FORMAT, what)).encode())
    for tensors in weights:
        for name, value in sorted(tensors.items()):
            named.update(name.encode())
            named.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return named.hexdigest()


@dataclass(frozen=True)
class State:
    """A job after ``step`` steps and ``spent`` seconds, ``scoring`` of them before the first step.

    ``tensors`` are named; ``optimizer`` is its ``state_dict``; ``dice`` what draws lessons;
    ``seconds`` each step's; ``seen`` the numbers of lessons that were drawn.
    """

    step: int
    spent: float
    scoring: float
    tensors: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    dice: dict[str, Any]
    method: str
    losses: list[float]
    seconds: list[float]
    seen: list[int]


@dataclass(frozen=True)
class _Writer:
    """What torch wants of a file: the state goes to disk without a copy of it in memory."""

    file: AtomicFile

    def write(self, data: bytes) -> int:
        self.file.write(data)
        return len(data)

    def flush(self) -> None:
        """The file is flushed when it is committed."""


class Checkpoints:
    """The files of one job.

    Args:
        folder: where they lie; None: nothing is kept.
        key: what they are for.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder = folder
        self._key = key

    def save(self, state: State) -> None:
        """Keep a state. A full disk costs the checkpoint, not the job: it is said in the log."""
        self._write(_STATE, vars(state))

    def load(self) -> State | None:
        """The latest state, or None."""
        raw = self._read(_STATE)
        return None if raw is None else State(**raw)

    def save_scores(self, scores: Mapping[str, Sequence[Target]]) -> None:
        """Keep what was scored before the first step."""
        self._write(_SCORES, {name: [t.state() for t in ts] for name, ts in scores.items()})

    def load_scores(self) -> dict[str, list[Target]] | None:
        """What was scored before, or None."""
        raw = self._read(_SCORES)
        if raw is None:
            return None
        return {name: [Target.from_state(t) for t in ts] for name, ts in raw.items()}

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        if self._folder is not None:
            write(self._folder / name, self._key, content)

    def _read(self, name: str) -> dict[str, Any] | None:
        return None if self._folder is None else read(self._folder / name, self._key)


def write(path: Path, key: str, content: Mapping[str, Any]) -> None:
    """Keep tensors and plain values under a key; a full disk is said in the log and no more."""
    try:
        with AtomicFile(path) as file:
            torch.save({"key": key, "content": dict(content)}, cast("IO[bytes]", _Writer(file)))
            file.commit()
    except (StorageError, RuntimeError) as error:
        # torch closes its archive although the file has failed, and then complains of that.
        log.warning("%s is not written, what was there stays: %s", path, error.__context__ or error)


def read(path: Path, key: str) -> dict[str, Any] | None:
    """What :func:`write` kept, or None: nothing, of another key, or broken."""
    if not path.exists():
        return None
    try:
        raw = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001  # torch raises many kinds for a broken file
        log.warning("%s cannot be read (%s): it is made anew", path.name, error)
        return None
    if not isinstance(raw, dict) or raw.get("key") != key:
        log.warning("%s was made for something else: it is made anew", path.name)
        return None
    content: dict[str, Any] = raw["content"]
    return content


def remove_checkpoints(folder: Path) -> None:
    """Delete what a job kept to go on from, finished or not: it has its result."""
    for name in (_SCORES, _STATE):
        for path in (folder / name, folder / (name + TEMPORARY)):
            path.unlink(missing_ok=True)
