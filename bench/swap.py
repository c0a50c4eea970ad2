"""Swaps under load: what people notice while one student after another is replaced.

A real agent process fetches ten releases over gRPC from a real fleet service (store, signatures,
deltas, rollout), applies, probes and swaps, while clients ask it without a pause. The students are
the packaged one and the same after it has learnt a skill, in turns, so that deltas are of the usual
size. A swap lasts from the moment that the cloud wants it until the device has committed.

Latency and requests/s are given for the time before, during and after; resident memory of the agent
in between and while two students are open. Then the same for a device that has no room for two
(``--memory-limit``): it closes the old student first, and requests wait.

Results go to ``build/bench/swap.json``. Some ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import engines, setup, student
from cloud.db import open_database
from cloud.fleet.service import FleetService, serve
from cloud.releases.store import ReleaseStore
from cloud.rollout.driver import RolloutDriver
from cloud.rollout.plan import Plan
from edge.student.runtime import Student, greedy
from protos.errors import AnabranchError, UnavailableError
from protos.prompt import Message, chat
from protos.v1 import device_pb2, release_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud.releases.store import Release

CHANNEL, CLIENTS = "home", 2
CANARIES = ("turn on the kitchen light", "switch the lamp in the bedroom off")
_BETWEEN_S = 3.0
_SWAP_S = 180.0
_SAMPLE_S = 0.05


@dataclass
class Load:
    """Clients that ask without a pause, and what came of it; times are of the monotonic clock."""

    url: str
    texts: list[str]
    requests: list[tuple[float, float, bool]] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, resident_mb: Callable[[], float]) -> None:
        """Begin to ask, and to look at the agent's memory."""
        work = [lambda n=n: self._ask(n) for n in range(CLIENTS)]
        for each in (*work, lambda: self._watch(resident_mb)):
            thread = threading.Thread(target=each, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, client: int) -> None:
        number = client
        with httpx.Client(base_url=self.url, timeout=120) as http:
            while not self._stop.is_set():
                text = self.texts[number % len(self.texts)]
                number += CLIENTS
                body = {"messages": [{"role": "user", "content": text}], "temperature": 0}
                start = time.monotonic()
                try:
                    good = http.post("/v1/chat/completions", json=body).is_success
                except httpx.HTTPError:
                    good = False
                self.requests.append((start, time.monotonic() - start, good))

    def _watch(self, resident_mb: Callable[[], float]) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.memory.append((time.monotonic(), resident_mb()))


class Cloud:
    """Store, rollout and fleet service on one state folder; every release is published before."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        registry = CollectorRegistry()
        self.store = ReleaseStore(
            folder=folder,
            engine=open_database(folder / "cloud.sqlite"),
            clock=time.time,
            registry=registry,
        )
        self.driver = RolloutDriver(
            engine=open_database(folder / "cloud.sqlite"),
            clock=time.time,
            registry=registry,
            plan=Plan(),
        )
        self.service = FleetService(store=self.store, driver=self.driver, registry=registry)

    def publish(self, bundle: Path) -> Release:
        """A release with canaries that the student itself has answered."""
        opened = Student.open(bundle, threads=student.THREADS)
        canaries = []
        for text in CANARIES:
            prompt = chat(opened.harness.system, [Message("user", text)])
            answer = opened.answer(prompt, greedy(opened.harness)).text
            asked = device_pb2.ChatMessage(role="user", content=text)
            canaries.append(release_pb2.Canary(messages=[asked], answer=answer))
        opened.close()
        bounds = release_pb2.ProbeBounds(min_equal_share=0.5)
        return self.store.publish(bundle, channel=CHANNEL, canaries=canaries, bounds=bounds)


async def swaps(
    cloud: Cloud, releases: list[Release], url: str, tell: Callable[[int], None]
) -> list[tuple[float, float]]:
    """Roll out one release after another; when each began and ended.

    Raises:
        UnavailableError: one did not arrive.
    """
    windows = []
    async with httpx.AsyncClient(base_url=url) as http:
        for number, release in enumerate(releases):
            tell(number)
            start = time.monotonic()
            cloud.driver.begin(CHANNEL, release.version, student=release.student)
            while True:
                health = (await http.get("/healthz", timeout=60)).json()
                if health["release"] == release.version and health["update"]["state"] == "idle":
                    break
                if time.monotonic() - start > _SWAP_S:
                    msg = f"release {release.version} did not arrive: {health['update']}"
                    raise UnavailableError(msg)
                await asyncio.sleep(0.05)
                cloud.driver.tick()
            windows.append((start, time.monotonic()))
            await asyncio.sleep(_BETWEEN_S)
    return windows


async def run(
    bundles: tuple[Path, Path],
    folder: Path,
    progress: Progress,
    *,
    count: int,
    limit: int,
    steady: float,
) -> dict[str, Any]:
    """One agent, one load, ``count`` swaps."""
    name = f"swaps, {limit} MB" if limit else "swaps"
    bar = progress.add_task(f"{name}: publish", total=count + 2)
    cloud = Cloud(folder)
    releases = [cloud.publish(bundles[(n + 1) % 2]) for n in range(count)]
    server, port = await serve(cloud.service, listen="127.0.0.1:0")
    texts = [s.messages[-1].content for s in student.commands(60, folder)]
    extra = ("--memory-limit", str(limit)) if limit else ()
    try:
        with engines.agent(
            bundles[0],
            folder,
            threads=student.THREADS,
            cloud=f"127.0.0.1:{port}",
            extra=extra,
        ) as agent:
            load = Load(agent.url, texts)
            await asyncio.sleep(1)
            load.start(agent.resident_mb)
            progress.update(bar, description=f"{name}: before")
            begin = time.monotonic()
            await asyncio.sleep(steady)
            windows = await swaps(
                cloud,
                releases,
                agent.url,
                lambda n: progress.update(bar, description=name, completed=n + 1),
            )
            progress.update(bar, description=f"{name}: after", completed=count + 1)
            end = time.monotonic()
            await asyncio.sleep(steady)
            load.stop()
            peak = agent.peak_mb()
        progress.update(bar, completed=count + 2)
    finally:
        await server.stop(5)
        await cloud.service.drain()
    return report(load, windows, before=(begin, begin + steady), after=(end, end + steady)) | {
        "peak_mb": peak,
    }


Window = tuple[float, float]


def report(load: Load, windows: list[Window], *, before: Window, after: Window) -> dict[str, Any]:
    """Figures of a run."""
    steady, during = figures(load, [before]), figures(load, windows)
    outside = [mb for at, mb in load.memory if before[0] <= at <= before[1]]
    inside = [mb for at, mb in load.memory if any(a <= at <= b for a, b in windows)]
    return {
        "swaps": len(windows),
        "failed_requests": sum(not good for *_, good in load.requests),
        "requests": len(load.requests),
        "swap_median_s": round(statistics.median(b - a for a, b in windows), 2),
        "before": steady,
        "during": during,
        "after": figures(load, [after]),
        "p99_ratio": round(during["p99_s"] / steady["p99_s"], 2),
        "steady_mb": round(statistics.median(outside), 1),
        "during_mb": round(max(inside), 1),
        "after_each_mb": [_resident_at(load, b + _BETWEEN_S) for _, b in windows],
    }


def _resident_at(load: Load, moment: float) -> float:
    return round(min(load.memory, key=lambda seen: abs(seen[0] - moment))[1], 1)


def figures(load: Load, windows: list[Window]) -> dict[str, float]:
    """Requests/s and latency of what overlaps the windows."""
    found = [
        seconds
        for start, seconds, _ in load.requests
        if any(start < b and start + seconds > a for a, b in windows)
    ]
    cuts = statistics.quantiles(found, n=100, method="inclusive")
    return {
        "requests_per_s": round(len(found) / sum(b - a for a, b in windows), 2),
        "median_s": round(statistics.median(found), 3),
        "p95_s": round(cuts[94], 3),
        "p99_s": round(cuts[98], 3),
        "max_s": round(max(found), 3),
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench/swap.json"))
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--steady", type=float, default=30.0, help="seconds before and after")
    parser.add_argument("--unloading-swaps", type=int, default=3, help="swaps without room for two")
    options = parser.parse_args()
    folder = options.out.parent / "swap"
    engines.end_in_good_order()
    try:
        with Progress() as progress:
            bar = progress.add_task("student", total=1.0)
            learnt, _ = student.learnt(
                options.out.parent / "student",
                lambda what, part: progress.update(bar, description=what, completed=part),
            )
            bundles = (learnt.parent / "import" / "bundle", learnt)
            stamp = time.strftime("%Y%m%d-%H%M%S")
            one = asyncio.run(
                run(
                    bundles,
                    folder / stamp,
                    progress,
                    count=options.swaps,
                    limit=0,
                    steady=options.steady,
                )
            )
            two = {}
            if options.unloading_swaps:
                place = folder / f"{stamp}-unloading"
                two = asyncio.run(
                    run(
                        bundles,
                        place,
                        progress,
                        count=options.unloading_swaps,
                        limit=1,
                        steady=options.steady,
                    )
                )
    except AnabranchError as error:
        sys.exit(f"error: {error}")
    note = {"date": time.strftime("%Y-%m-%d"), "machine": setup.machine(), "clients": CLIENTS}
    figures: dict[str, Any] = one | {"unloading": two}
    setup.write(options.out, note | figures)
    table = Table("", "requests/s", "median", "p95", "p99", "max")
    for phase in ("before", "during", "after"):
        table.add_row(phase, *(f"{v:.2f}" for v in figures[phase].values()))
    shown = {k: figures[k] for k in ("failed_requests", "p99_ratio", "steady_mb", "during_mb")}
    Console().print(table, shown, two)


if __name__ == "__main__":
    main()
