"""One tool makes or applies one delta, in this process: seconds and peak memory go to stdout.

    python -m bench.delta_tool TOOL make|apply BASE TARGET DELTA [FACTORS]

``TARGET`` is read by ``make`` and written by ``apply``; ``FACTORS`` are what was learnt, of tools
that send it as such. Imports stay small: they are part of the
peak (``VmHWM`` of ``/proc``; of a command, what it alone took).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LONG = "--long=28"
"""A window of 256 MiB: all of the student's weights."""
_WINDOW = str(1 << 28)


def _commands(tool: str, base: str, target: str, delta: str) -> dict[str, list[str]]:
    patch = f"--patch-from={base}"
    return {
        "zstd_patch": {
            "make": ["zstd", "-qf", "-19", _LONG, patch, target, "-o", delta],
            "apply": ["zstd", "-qdf", _LONG, patch, delta, "-o", target],
        },
        "full_zstd": {
            "make": ["zstd", "-qf", "-19", _LONG, target, "-o", delta],
            "apply": ["zstd", "-qdf", _LONG, delta, "-o", target],
        },
        "xdelta": {
            "make": ["xdelta3", "-ef", "-9", "-B", _WINDOW, "-s", base, target, delta],
            "apply": ["xdelta3", "-df", "-B", _WINDOW, "-s", base, delta, target],
        },
    }[tool]


COMMANDS = ("zstd_patch", "full_zstd", "xdelta")


def missing(tool: str) -> str | None:
    """Why a tool cannot run here, or None."""
    if tool not in COMMANDS:
        return None
    program = _commands(tool, "", "", "")["make"][0]
    return None if shutil.which(program) else f"{program} is not installed"


def _bsdiff(action: str, base: Path, target: Path, delta: Path) -> None:
    import bsdiff4  # noqa: PLC0415  # only what is measured is imported

    if action == "make":
        bsdiff4.file_diff(str(base), str(target), str(delta))
    else:
        bsdiff4.file_patch(str(base), str(target), str(delta))


def _anabranch(action: str, base: Path, target: Path, delta: Path, updates: Path | None) -> None:
    from edge import delta as codec  # noqa: PLC0415

    if action == "apply":
        codec.apply(base, delta, target)
        return
    tensors = codec.tensors_in(json.loads((base.parent / "student.json").read_bytes()))
    some = codec.load_updates(updates) if updates else ()
    codec.encode(base, target, delta, tensors=tensors, updates=some)


def _lora(action: str, base: Path, target: Path, delta: Path, factors: Path) -> None:
    """Make: fp16 factors in a file. Apply: merge them into the base's weights, on its scales."""
    import numpy as np  # noqa: PLC0415

    from edge import delta as codec  # noqa: PLC0415

    if action == "make":
        with np.load(factors) as arrays, delta.open("wb") as file:
            np.savez(file, **{name: arrays[name].astype(np.float16) for name in arrays})
        return
    layout = json.loads((base.parent / "student.json").read_bytes())
    sources = {raw["offset"]: raw["sources"] for raw in layout["tensors"]}
    shutil.copyfile(base, target)
    weights = np.memmap(target, np.uint8, "r+")
    with np.load(delta) as arrays:
        for tensor in codec.tensors_in(layout):
            names = sources[tensor.offset]
            if any(f"{name}.up" not in arrays for name in names):
                continue
            factor = [(arrays[f"{n}.up"], arrays[f"{n}.down"]) for n in names]
            update = np.concatenate([up.astype("f4") @ down.astype("f4") for up, down in factor])
            scales = weights[tensor.scales : tensor.scales_stop].view("<f4")[:, None]
            codes = weights[tensor.offset : tensor.stop].reshape(-1, tensor.block)
            moved = codes + np.rint(update.reshape(codes.shape) / scales)
            codes[:] = np.clip(moved, 1, 255)
    weights.flush()


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measured(work: Callable[[], None]) -> dict[str, float]:
    """Seconds, and MiB at the peak of this process."""
    start = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start, "peak_mb": _peak()}


def _run(command: list[str]) -> dict[str, float]:
    """The same of another program: this process is small, so that its own peak hides none."""
    start = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"{' '.join(command)}: failed with status {status}")
    return {"seconds": time.perf_counter() - start, "peak_mb": usage.ru_maxrss / 1024}


def main() -> None:
    """Run one tool once."""
    tool, action, base, target, delta, *rest = sys.argv[1:]
    if tool in COMMANDS:
        figures = _run(_commands(tool, base, target, delta)[action])
    else:
        paths = Path(base), Path(target), Path(delta)
        if tool == "bsdiff":
            figures = measured(lambda: _bsdiff(action, *paths))
        elif tool == "lora16":
            figures = measured(lambda: _lora(action, *paths, Path(rest[0])))
        else:
            updates = Path(rest[0]) if rest else None
            figures = measured(lambda: _anabranch(action, *paths, updates))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
