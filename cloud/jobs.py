"""Adaptation jobs on disk: what each works on, its process, its result.

``STATE/jobs/0001/`` holds ``spec.json`` and ``evidence.json`` (ids that are learnt and held out),
written before the process starts; ``progress.json`` and ``result.json`` by the process
(:mod:`cloud.adapt`); and ``published.json`` with the release's version at the end. Whatever dies,
the files say where to go on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from cloud.adapt import (
    CANDIDATE,
    LEARNT,
    NO_ROOM,
    UPDATES,
    Spec,
    write_atomically,
    write_failure,
)
from cloud.lessons import Evidence
from edge.delta import load_updates
from edge.delta.files import storage_errors
from edge.process import PARENT
from protos.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from edge.delta import Update
    from protos.prompt import Shown

log = logging.getLogger("anabranch.jobs")
Given = TypeVar("Given")

_FULL_S = 600.0  # a job that finds the disk full again has trained in vain


@dataclass(frozen=True)
class Used:
    """Ids of demonstrations that no job takes again: learnt, held out, left out as too long."""

    learnt: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


class Job:
    """One job's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """Number of the job, as its folder is named."""
        return self.folder.name

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            value: dict[str, Any] = json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            return None
        return value

    @property
    def result(self) -> dict[str, Any] | None:
        """``result.json``, or None while the job is not done."""
        return self._read("result.json")

    @property
    def progress(self) -> dict[str, Any] | None:
        """``progress.json``, or None before the process began."""
        return self._read("progress.json")

    @property
    def version(self) -> int | None:
        """The release made of it, or None."""
        note = self._read("published.json")
        return None if note is None else int(note["version"])

    @property
    def evidence(self) -> Evidence:
        """What it learns and what it holds out."""
        note = self._read("evidence.json") or {"learn": [], "held_out": []}
        return Evidence(**{name: tuple(ids) for name, ids in note.items()})

    @property
    def used(self) -> Used:
        """Its evidence but for what its steps did not come to, which waits for another job."""
        result, evidence = self.result or {}, self.evidence
        return Used(
            tuple(_learnt(evidence.learn, result)),
            evidence.held_out,
            tuple(evidence.learn[i] for i in result.get("left_out", ())),
        )

    @property
    def candidate(self) -> Path:
        """The bundle it made."""
        return self.folder / CANDIDATE

    @property
    def learnt(self) -> Path:
        """fp32 parameters that differ from the imported model."""
        return self.folder / LEARNT

    @property
    def updates(self) -> list[Update]:
        """Products that turn the codes it found in service into the candidate's; none: codes.

        They only make the delta smaller: a damaged file holds nothing up.

        Raises:
            StorageError: the file cannot be read.
        """
        path = self.folder / UPDATES
        try:
            return load_updates(path) if path.exists() else []
        except IntegrityError as error:
            log.warning("the delta is made without products: %s", error)
            return []

    def published(self, version: int) -> None:
        """Note that a release was made of it."""
        write_atomically(self.folder / "published.json", json.dumps({"version": version}))

    def failed(self, why: str) -> None:
        """Note that it came to no result."""
        write_failure(self.folder, why)


class Process(Protocol):
    """What is used of a :class:`subprocess.Popen`."""

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def wait(self) -> int:
        """Wait until it has."""


class Jobs:
    """All jobs of a cloud, and the one that runs.

    Args:
        folder: of all jobs.
        clock: in seconds.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._process: Process | None = None
        self._name = ""
        self._log: IO[bytes] | None = None
        self._full_until = -math.inf
        self.exit_code = 0
        """Of the process that ended last."""
        self.tries: dict[str, int] = {}
        """How often each job was started, but for those that a full disk stopped."""

    def all(self) -> list[Job]:
        """Jobs from the first to the latest."""
        folders = self._folder.glob("[0-9]*")
        return [Job(f) for f in sorted(folders) if (f / "spec.json").exists()]

    def create(self, spec: Spec, evidence: Evidence) -> Job:
        """Write down a new job; it starts with :meth:`start`.

        Raises:
            StorageError: the disk is full or failed: there is no new job.
        """
        jobs = self.all()
        number = int(jobs[-1].name) + 1 if jobs else 1
        folder = self._folder / f"{number:04d}"
        with storage_errors(f"making the folder of job {folder.name}"):
            shutil.rmtree(folder, ignore_errors=True)  # left by a crash: it has no spec
            folder.mkdir(parents=True)
        write_atomically(folder / "evidence.json", json.dumps(asdict(evidence)))
        write_atomically(folder / "spec.json", spec.to_json())
        return Job(folder)

    def start(self, job: Job) -> None:
        """Run a job in a process that ends with this one."""
        with storage_errors(f"opening the log of job {job.name}"):
            self._log = (job.folder / "log.txt").open("ab")
        self._process, self._name = self._spawn(job), job.name
        self.tries[job.name] = self.tries.get(job.name, 0) + 1

    def _spawn(self, job: Job) -> Process:
        return subprocess.Popen(  # noqa: S603  # our own module and folder
            [sys.executable, "-m", "cloud.adapt", str(job.folder)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=os.environ | {PARENT: str(os.getpid())},
        )

    def running(self) -> bool:
        """Whether a job's process runs."""
        if self._process is None or (code := self._process.poll()) is None:
            return self._process is not None
        self.exit_code = code
        if code == NO_ROOM:
            log.error("job %s was stopped by a full disk: free space, it goes on", self._name)
            self._full_until = self._clock() + _FULL_S
            del self.tries[self._name]
        self._close()
        return False

    @property
    def disk_full(self) -> bool:
        """Whether a full disk stopped a job a short time ago: it is not tried again at once."""
        return self._clock() < self._full_until

    def stop(self) -> None:
        """End the running process; its job is run again at the next start."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._close()

    def _close(self) -> None:
        self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


def learnt(spec: Spec, result: Mapping[str, Any]) -> list[Shown]:
    """What a job trained on: all it was given but what was too long, or not seen in its steps."""
    return _learnt(spec.train, result)


def _learnt(given: Sequence[Given], result: Mapping[str, Any]) -> list[Given]:
    """Of what a job was given, in the order of its spec, what it trained on."""
    not_learnt = {*result.get("left_out", ()), *result.get("unseen", ())}
    return [d for i, d in enumerate(given) if i not in not_learnt]


def answered(spec: Spec, result: Mapping[str, Any]) -> list[Shown]:
    """What the candidate answered right of what it was not trained on, the new first."""
    asked = (*spec.held_out, *spec.earlier)
    return [d for d, c in zip(asked, result["canaries"], strict=True) if c["answer"] == d.answer]


def used(jobs: Sequence[Job], alive: Collection[int]) -> tuple[Used, Job | None]:
    """What the jobs have used whose releases still count, and the latest of them."""
    counted = [j for j in jobs if j.version in alive]
    each = [job.used for job in counted]
    together = Used(
        tuple(i for u in each for i in u.learnt),
        tuple(i for u in each for i in u.held_out),
        tuple(i for u in each for i in u.left_out),
    )
    return together, counted[-1] if counted else None
