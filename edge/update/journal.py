"""What the update client must remember across a power loss: one small file, written before acting.

``STATE/update/journal.json`` holds one record and the SHA-256 of its canonical JSON. It is replaced
as a whole. A file that is not what its checksum says is set aside and reported, and the client
begins anew: the pointer and the slots, not the journal, say what can serve.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from edge.delta.files import make_folder, set_aside, storage_errors, write_atomic
from edge.update.machine import State
from edge.update.slots import NOBODY, Entry
from protos.v1 import fleet_pb2

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 1

KEPT_REPORTS = 8
"""Reports of how updates ended that wait for the cloud, at most."""

_ENDS = (State.IDLE, State.COMMITTED, State.FAILED, State.INCONSISTENT)


@dataclass(frozen=True)
class Report:
    """An ``UpdateReport`` that the cloud has not taken yet, without channel and device."""

    release: int
    state: State
    student: str
    detail: str
    sequence: int
    delta_bytes: int
    probe_equal_share: float

    def message(self) -> fleet_pb2.UpdateReport:
        """As it goes to the cloud."""
        return fleet_pb2.UpdateReport(
            release=self.release,
            state=cast("fleet_pb2.UpdateState.ValueType", int(self.state)),
            student=self.student,
            detail=self.detail,
            sequence=self.sequence,
            delta_bytes=self.delta_bytes,
            probe_equal_share=self.probe_equal_share,
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """The journal's one record.

    Attributes:
        state: what the client is doing.
        release: version that the update in progress is about; 0: none was ever.
        student: digest of its student, once its manifest was believed.
        base: what served when it began: where a rollback goes.
        steps: journal entries of this update.
        strikes: times that its bytes were wrong.
        full: whether deltas are not to be used any more.
        probe_starts: probes that began.
        equal_share: of canaries, from the last probe.
        detail: why it failed.
        failed: the last student that failed, with its release; the digest is empty when no
            manifest could be believed.
        floor: highest release ever committed; nothing older is taken.
        sequence: of the last report.
        reports: what the cloud has still to hear, oldest first.
    """

    state: State = State.IDLE
    release: int = 0
    student: str = ""
    base: Entry = NOBODY
    steps: int = 0
    strikes: int = 0
    full: bool = False
    probe_starts: int = 0
    equal_share: float = 0.0
    detail: str = ""
    failed: Entry = NOBODY
    floor: int = 0
    sequence: int = 0
    reports: tuple[Report, ...] = ()

    def reporting(self, state: State, *, serving: str, delta_bytes: int, now_ms: int) -> Record:
        """Queue a report of ``state``.

        Of what is on the way only the newest waits; of how updates ended each does. Sequences
        start from the clock, so that they grow even past a lost journal.
        """
        sequence = max(self.sequence + 1, now_ms)
        report = Report(
            self.release, state, serving, self.detail, sequence, delta_bytes, self.equal_share
        )
        ends = [r for r in self.reports if r.state in _ENDS][-(KEPT_REPORTS - 1) :]
        return replace(self, sequence=sequence, reports=(*ends, report))


class Journal:
    """Reads and writes the record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with storage_errors(f"creating {path.parent}"):
            make_folder(path.parent)

    def read(self) -> Record:
        """The record; an empty one when there is none or it cannot be read.

        Raises:
            StorageError: it cannot be set aside either.
        """
        try:
            return _parse(self._path.read_bytes()) if self._path.exists() else Record()
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            set_aside(self._path, str(error))
            return Record()

    def write(self, record: Record) -> None:
        """Replace the record, durably.

        Raises:
            StorageError: the disk is full or failed; the old record is still there.
        """
        body = asdict(record)
        whole = {"version": VERSION, "sha256": _checksum(body), "record": body}
        write_atomic(self._path, json.dumps(whole, indent=1).encode() + b"\n")


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _parse(data: bytes) -> Record:
    whole = json.loads(data)
    if whole["version"] != VERSION:
        msg = f"journal version {whole['version']!r} is not {VERSION}"
        raise ValueError(msg)
    body = whole["record"]
    if whole["sha256"] != _checksum(body):
        msg = "its checksum is wrong"
        raise ValueError(msg)
    reports = tuple(Report(**{**r, "state": State(r["state"])}) for r in body["reports"])
    entries = {name: Entry(**body[name]) for name in ("base", "failed")}
    return Record(**{**body, **entries, "state": State(body["state"]), "reports": reports})
