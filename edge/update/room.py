"""Is there memory for a second student beside the one that serves?

A session holds its weights twice for a moment and once for good: ONNX Runtime packs them into an
order of its own, and the pages of the file that it read them from can be dropped by the kernel.
"""

from __future__ import annotations

from pathlib import Path

from edge.student.bundle import WEIGHTS
from edge.update.probe import resident_bytes

_PER_WEIGHT = 1.3  # bytes that a session takes for each byte of its weights file, measured
_BESIDES = 48 * 1024 * 1024  # tokenizer, keys and values of the canaries
_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = ("high", "max")  # above the first one the kernel slows the process down
_MEMINFO = Path("/proc/meminfo")


def needed_bytes(weights: int) -> int:
    """What an open student takes whose weights file has ``weights`` bytes."""
    return int(weights * _PER_WEIGHT) + _BESIDES


def enough(needed: int, *, available: int | None, limit: int, resident: int) -> bool:
    """Whether ``needed`` more bytes fit.

    Args:
        needed: bytes of the second student.
        available: bytes that the system can give; None where it does not say.
        limit: most resident bytes that this process may have; 0 for no limit.
        resident: what it has now.

    >>> enough(200, available=150, limit=0, resident=300)
    False
    >>> enough(200, available=None, limit=600, resident=300)
    True
    """
    if limit and resident + needed > limit:
        return False
    return available is None or needed <= available


def available_bytes(group: Path | None = None, meminfo: Path = _MEMINFO) -> int | None:
    """What system and service manager leave this process; None where neither says.

    Args:
        group: folder of this process's control group (version 2); found out where None.
        meminfo: as ``/proc/meminfo``.
    """
    found = [b for b in (_of_machine(meminfo), _of_group(group or _own_group())) if b is not None]
    return min(found, default=None)


def has_room(bundle: Path, *, limit: int) -> bool:
    """Whether the student in ``bundle`` can be opened beside the one that serves."""
    try:
        weights = (bundle / WEIGHTS).stat().st_size
    except OSError:
        return True  # opening it will say what is wrong
    return enough(
        needed_bytes(weights),
        available=available_bytes(),
        limit=limit,
        resident=resident_bytes(),
    )


def _of_machine(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _own_group() -> Path:
    try:
        name = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition("::/")[2]
    except OSError:
        return _CGROUP
    return _CGROUP / name


def _of_group(group: Path) -> int | None:
    """Room below the lower of both limits, pages of files that can go counted in."""
    try:
        limits = [(group / f"memory.{n}").read_text(encoding="ascii").strip() for n in _LIMITS]
        used = int((group / "memory.current").read_text(encoding="ascii"))
        rows = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        droppable = int(dict(row.split() for row in rows).get("inactive_file", "0"))
        numbers = [int(limit) for limit in limits if limit != "max"]
    except (OSError, ValueError):
        return None
    return min(numbers) - used + droppable if numbers else None
