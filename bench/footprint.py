"""What a device's agent takes: disk of ``pip install anabranch[edge]``, and resident memory.

The distribution is built from this checkout and installed with its extra ``edge`` into a fresh
virtual environment; the agent of that environment then serves the packaged student. Memory is the
process's resident set: before the first request, after some, and at its peak.

Results go to ``build/bench/footprint.json``. A few minutes, most of them pip's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import engines, setup, skills
from protos.errors import AnabranchError

FORBIDDEN = ("torch", "transformers", "river", "scipy", "pandas", "sqlalchemy")
_REST_S = 3
_TEXTS = ("turn on the lamp", "turn off the garage light please", "set the kitchen to fifty")


def install(folder: Path) -> dict[str, Any]:
    """A fresh environment with the extra ``edge``: its size and packages."""
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", ".[edge]"], check=True)
    listed = subprocess.run(
        [*pip, "list", "--format", "json"], check=True, capture_output=True, text=True
    )
    names = {p["name"].lower() for p in json.loads(listed.stdout)} - {"pip", "setuptools"}
    site = next(folder.glob("lib/python*/site-packages"))
    sizes = {
        p.name: _size(p) for p in site.iterdir() if not p.name.startswith(("pip", "setuptools"))
    }
    return {
        "disk_mb": round(sum(sizes.values()) / 1e6, 1),
        "packages": len(names),
        "unwanted": sorted(names.intersection(FORBIDDEN)),
        "largest_mb": {n: round(s / 1e6, 1) for n, s in Counter(sizes).most_common(8)},
    }


def _size(path: Path) -> int:
    """Bytes on the disk, without caches of byte code, which each start may make anew."""
    if path.is_file():
        return path.stat().st_size
    files = (p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
    return sum(p.stat().st_size for p in files)


def memory(bundle: Path, folder: Path, python: Path) -> dict[str, Any]:
    """Resident memory of an agent."""
    with engines.agent(bundle, folder, threads=setup.THREADS, python=python) as agent:
        time.sleep(_REST_S)
        rest, parts = agent.resident_mb(), _mapped(agent.pid)
        client = engines.Client(agent, skills.SYSTEM, None)
        for text in _TEXTS:
            client.ask(text, 40)
        time.sleep(_REST_S)
        after, peak = agent.resident_mb(), agent.peak_mb()
        client.close()
    return {"rest_mb": rest, "after_requests_mb": after, "peak_mb": peak, "rest_parts_mb": parts}


def _mapped(pid: int) -> dict[str, float]:
    """Resident MB by what is mapped."""
    found: Counter[str] = Counter()
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)", line)
        if head:
            name = re.sub(r".*/site-packages/([^/]+)/.*", r"\1", head[1]).rpartition("/")[2]
        elif line.startswith("Rss:"):
            found[name or "anonymous"] += int(line.split()[1])
    return {n: round(kb / 1024, 1) for n, kb in found.most_common(8)}


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/footprint.json"))
    options = parser.parse_args()
    folder = options.out.parent / "footprint"
    try:
        student = setup.student(
            skills.harness(), options.out.parent / "learner-student", lambda *_: None
        )
        print("installing anabranch[edge] into a fresh environment")
        disk = install(folder / "venv")
        print("starting its agent")
        resident = memory(student.bundle, folder / "agent", folder / "venv" / "bin" / "python")
    except AnabranchError as error:
        sys.exit(f"error: {error}")
    note = {"date": time.strftime("%Y-%m-%d"), "machine": setup.machine(), **disk, **resident}
    setup.write(options.out, note)
    table = Table("what", "MB")
    table.add_row("on disk", f"{note['disk_mb']:.0f}")
    for name in ("rest_mb", "after_requests_mb", "peak_mb"):
        table.add_row(name.removesuffix("_mb").replace("_", " "), f"{note[name]:.0f}")
    Console().print(table, note["largest_mb"], note["rest_parts_mb"], note["unwanted"])


if __name__ == "__main__":
    main()
