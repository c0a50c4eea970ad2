"""A fleet on one machine: what watch streams cost a cloud, and what reaches them how fast.

One server process (:mod:`bench.fleet_server`) has the real store, rollout driver and fleet service.
Devices are streams with a connection each, in processes of a thousand (:mod:`bench.fleet_clients`);
they, the server and a health checker share the machine's cores and its loopback.

1. A thousand streams open. Memory is the server's resident set above what it was before the first.
2. A release begins; the time runs until the last device has heard of it.
3. Some devices read a delta at once, then again with a report before and after, as devices do.
   Beside it: the same bytes out of the memory of a gRPC server that does nothing else.
4. More streams, a thousand at a time, until a bound of the issue breaks or ``--most`` are open.

Health is checked twenty times a second all the while, at a fixed pace: a late answer delays no
later question. Results go to ``build/bench/fleet.json``. Some four minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import setup
from bench.engines import end_in_good_order, status_kb

if TYPE_CHECKING:
    from collections.abc import Callable

STEP = 1000
MOST_NOTIFY_S = 2.0
MOST_HEALTH_MS = 200.0
_ANSWER_S = 300.0
_SETTLE_S = 3.0
_MB = 1e6


class Part:
    """A child process that is told things and says things, a JSON object a line."""

    def __init__(self, module: str, *arguments: str) -> None:
        command = [sys.executable, "-m", module, *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._input, self._output = self._process.stdin, self._process.stdout
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._output or ():
            self._said.put(json.loads(line))
        self._said.put(None)

    def tell(self, **order: object) -> None:
        """Give an order."""
        print(json.dumps(order), file=self._input, flush=True)

    def hears(self, key: str) -> dict[str, Any]:
        """The next thing it says that has ``key``."""
        while True:
            said = self._said.get(timeout=_ANSWER_S)
            if said is None:
                sys.exit(f"error: a part of the benchmark ended: {self._process.args!r}")
            if key in said:
                return said

    def end(self) -> dict[str, Any] | None:
        """Close its input; what it says last."""
        if self._input is not None:
            self._input.close()
        last = None
        while (said := self._said.get(timeout=_ANSWER_S)) is not None:
            last = said
        self._process.wait()
        return last

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()

    def memory_mb(self, field: str = "VmRSS") -> float:
        """Resident memory in 10^6 bytes now, or at most (``VmHWM``)."""
        return status_kb(self._process.pid, field) * 1024 / _MB

    def forget_peak(self) -> None:
        """Let ``VmHWM`` begin anew."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5", encoding="ascii")

    def processor_s(self) -> float:
        """Processor time so far."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="ascii")
        fields = stat.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Bench:
    """The server, its clients, and what was measured of them."""

    def __init__(self, stack: ExitStack, delta_bytes: int) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        self._stack = stack
        self.server = self._start("bench.fleet_server", folder, str(delta_bytes))
        self.known = self.server.hears("address")
        self._first, self._second = self.known["releases"]
        self._version = self._second["version"]
        self.clients: list[Part] = []
        self._opened = 0
        self.checker = self._start(
            "bench.fleet_clients", "checker", json.dumps({"address": self.known["address"]})
        )
        time.sleep(_SETTLE_S)
        self.idle_mb = self.server.memory_mb()
        self.idle_processor_s = self.server.processor_s()

    def _start(self, module: str, *arguments: str) -> Part:
        part = Part(module, *arguments)
        self._stack.callback(part.kill)
        return part

    @property
    def streams(self) -> int:
        """How many are open."""
        return self._opened

    def more(self, count: int) -> dict[str, float]:
        """Open so many more streams."""
        options = {
            "address": self.known["address"],
            "first": self.streams,
            "count": count,
            "student": self._first["student"],
            "release": self._first["version"],
        }
        before, began = self.server.processor_s(), time.monotonic()
        client = self._start("bench.fleet_clients", "devices", json.dumps(options))
        self.clients.append(client)
        self._opened += count
        opened = client.hears("version")["last"] - began
        time.sleep(_SETTLE_S)
        over = self.server.memory_mb() - self.idle_mb
        return {
            "open_s": opened,
            "open_processor_s": self.server.processor_s() - before,
            "memory_over_idle_mb": over,
        }

    def notify(self, *, made_up: bool = False) -> dict[str, float]:
        """Begin a release; how long until the last device has heard of it."""
        student = self._second["student"]
        if made_up:
            self._version += 1
            student = f"{self._version:064x}"
        before = self.server.processor_s()
        self.server.tell(version=self._version, student=student)
        begun = self.server.hears("at")
        last = max(self._hears(client) for client in self.clients)
        return {
            "notify_all_s": last - begun["at"],
            "stored_s": begun["stored_s"],
            "notify_processor_s": self.server.processor_s() - before,
        }

    def _hears(self, client: Part) -> float:
        while (said := client.hears("version"))["version"] != self._version:
            pass
        return float(said["last"])

    def fetch(
        self, devices: int, *, reports: bool = False, plain: bool = False
    ) -> dict[str, float]:
        """So many devices read the delta at once."""
        (sha256, size) = self._second["deltas"][-1]
        order: dict[str, Any] = {"sha256": sha256, "size": size, "devices": devices}
        order |= {"version": self._second["version"], "student": self._second["student"]}
        order["reports"] = reports
        if plain:
            order["plain"] = self.known["plain"]
        self.server.forget_peak()
        before, memory = self.server.processor_s(), self.server.memory_mb()
        self.clients[0].tell(**order)
        done = self.clients[0].hears("fetched")
        return {
            "devices": devices,
            "delta_mb": size / _MB,
            "served_mb": done["fetched"] / _MB,
            "seconds": done["seconds"],
            "slowest_read_s": done["slowest_s"],
            "mb_per_s": done["fetched"] / _MB / done["seconds"],
            "processor_s": self.server.processor_s() - before,
            "memory_more_mb": self.server.memory_mb("VmHWM") - memory,
        }


def percentile(values: list[float], share: float) -> float:
    """The value that ``share`` of ``values`` do not exceed."""
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


def health(checks: list[list[float]], phases: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Milliseconds of health checks: of all, and of those in each phase."""
    figures = {}
    for name, (begin, end) in phases.items():
        found = [1000 * took for at, took in checks if begin <= at <= end]
        if len(found) > 1:
            figures[name] = {
                "checks": len(found),
                "p50_ms": percentile(found, 0.5),
                "p99_ms": percentile(found, 0.99),
                "max_ms": max(found),
            }
    return figures


def run(options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """All of it."""
    phases: dict[str, tuple[float, float]] = {}

    def during(name: str, what: Callable[[], dict[str, float]]) -> dict[str, float]:
        tell(name)
        begin = time.monotonic()
        figures = what()
        phases[name] = (begin, time.monotonic())
        return figures

    with ExitStack() as stack:
        tell("server")
        bench = Bench(stack, options.delta_bytes)
        began = time.monotonic()
        first = during("open", lambda: bench.more(options.streams))
        first |= during("notify", bench.notify)
        fetched = during("fetch", lambda: bench.fetch(options.devices))
        reported = during("fetch, reports", lambda: bench.fetch(options.devices, reports=True))
        ended = time.monotonic()
        phases["all"] = (began, ended)
        processor = bench.server.processor_s() - bench.idle_processor_s
        ceiling = during("fetch from memory", lambda: bench.fetch(options.devices, plain=True))
        steps = []
        while bench.streams < options.most:
            name = f"{bench.streams + STEP} streams"
            step = during(name, lambda: bench.more(STEP) | bench.notify(made_up=True))
            steps.append({"streams": bench.streams, **step})
            if step["notify_all_s"] > MOST_NOTIFY_S:
                break
        said = bench.checker.end() or {"checks": []}
    checked = health(said["checks"], phases)
    for step in steps:
        step["health_p99_ms"] = checked[f"{step['streams']} streams"]["p99_ms"]
    fit = options.streams
    for step in steps:
        if step["notify_all_s"] > MOST_NOTIFY_S or step["health_p99_ms"] > MOST_HEALTH_MS:
            break
        fit = int(step["streams"])
    return {
        "streams": options.streams,
        "memory_over_idle_mb": first["memory_over_idle_mb"],
        "notify_all_s": first["notify_all_s"],
        "health_p99_ms": checked["all"]["p99_ms"],
        "idle_mb": bench.idle_mb,
        "kb_a_stream": 1000 * first["memory_over_idle_mb"] / options.streams,
        "processor_s": processor,
        "open": first,
        "fetch": fetched,
        "fetch_with_reports": reported,
        "fetch_from_memory": ceiling,
        "share_of_memory_speed": fetched["mb_per_s"] / ceiling["mb_per_s"],
        "health": checked,
        "more": steps,
        "most_within_bounds": fit,
    }


def _rounded(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/fleet.json"))
    parser.add_argument("--streams", type=int, default=STEP, help="streams of the main figures")
    parser.add_argument("--devices", type=int, default=200, help="devices that fetch at once")
    parser.add_argument("--delta-bytes", type=int, default=3_000_000)
    parser.add_argument("--most", type=int, default=8000, help="streams to go up to")
    options = parser.parse_args()
    end_in_good_order()
    with Progress() as progress:
        bar = progress.add_task("fleet", total=None)
        figures = _rounded(run(options, lambda what: progress.update(bar, description=what)))
    note = {"date": time.strftime("%Y-%m-%d"), "machine": setup.machine()}
    setup.write(options.out, note | figures)
    table = Table("streams", "MB over idle", "all notified", "health p99")
    main_row = {"streams": options.streams, "health_p99_ms": figures["health_p99_ms"]}
    for row in (figures["open"] | main_row, *figures["more"]):
        table.add_row(
            str(row["streams"]),
            f"{row['memory_over_idle_mb']:.0f}",
            f"{row['notify_all_s']:.2f} s",
            f"{row['health_p99_ms']:.0f} ms",
        )
    Console().print(
        table, *(figures[f"fetch{what}"] for what in ("", "_with_reports", "_from_memory"))
    )


if __name__ == "__main__":
    main()
