"""What happened in the demo, in order: kept in memory for the report, and on disk as it happens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Event = dict[str, Any]


class Record:
    """Events, each with ``t`` (seconds since the start) and ``kind``, also in ``events.jsonl``.

    ========== =====================================================================
    kind       fields
    ========== =====================================================================
    phase      name
    ask        device, phase, skill, right, seconds, release
    alarm      device, phase, commands (since the phase began on this device)
    job        name, state (learning, done), demonstrations
    release    version
    swap       device, release
    measure    name, skill, right, count
    ========== =====================================================================
    """

    def __init__(self, file: Path, clock: Callable[[], float]) -> None:
        self._path = file
        self._clock = clock
        self._began = clock()
        self.events: list[Event] = []

    def __enter__(self) -> Self:
        self._file = self._path.open("w")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    def add(self, kind: str, **fields: object) -> Event:
        """Write down an event that happens now."""
        event = {"t": round(self.now, 2), "kind": kind, **fields}
        self.events.append(event)
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        return event

    def of(self, kind: str, **fields: object) -> Iterator[Event]:
        """Events of a kind whose fields have these values."""
        for event in self.events:
            if event["kind"] == kind and all(event.get(k) == v for k, v in fields.items()):
                yield event
