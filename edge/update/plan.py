"""Which bytes a device needs to get from the student that it has to the one it should have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protos.v1 import release_pb2


@dataclass(frozen=True)
class Download:
    """A file or a delta to fetch; ``size`` in bytes."""

    kind: str  # "delta" or "file", as the metrics' label says
    sha256: str
    size: int


@dataclass(frozen=True)
class Step:
    """How one file of the new slot is made.

    Without a download it is the base's own file; a "file" is the download itself; a "delta" turns
    the base's file of the same name into it.
    """

    name: str
    download: Download | None


def plan(
    manifest: release_pb2.Manifest, base: Mapping[str, str], *, full: bool
) -> tuple[Step, ...]:
    """Decide for each file of the release.

    Args:
        manifest: a trusted manifest.
        base: SHA-256 of each file of the student in service, as it is on the disk now, by name.
        full: whether deltas are to be left alone.
    """
    deltas = {(d.base_sha256, d.target_sha256): d for d in manifest.deltas}
    steps = []
    for file in manifest.files:
        download = None
        if base.get(file.name) != file.sha256:
            delta = deltas.get((base.get(file.name, ""), file.sha256))
            if delta is None or full or delta.size >= file.size:
                download = Download("file", file.sha256, file.size)
            else:
                download = Download("delta", delta.sha256, delta.size)
        steps.append(Step(file.name, download))
    return tuple(steps)


def downloads(steps: tuple[Step, ...]) -> tuple[Download, ...]:
    """What to fetch, the same bytes once."""
    return tuple(dict.fromkeys(s.download for s in steps if s.download is not None))
