"""Kills a driver with SIGKILL at each of its writes, goes on after it, and compares the end.

``python rollout_killed.py FOLDER`` plays a story of two channels once without a kill, then once for
every write to the database, with a forked process that ends there. Whoever was not answered asks
again, as devices, curator and people do. It prints how many kills there were, by kind.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, event

from cloud.db import open_database
from cloud.rollout import events
from cloud.rollout.driver import RolloutDriver
from cloud.rollout.events import Outcome, Report
from cloud.rollout.orders import Orders
from cloud.rollout.plan import Plan
from cloud.rollout.state import Content

if TYPE_CHECKING:
    from collections.abc import Callable

ONE, TWO, THREE = "11" * 32, "22" * 32, "33" * 32
PLAN = Plan(waves=(1, "rest"), min_healthy_share=0.5, box_failures=1, max_updating=2)
NAMES = ("attic", "hall", "porch")
NOW = 1e9


class Story:
    """What happens, step by step; ``truth`` is what each device runs, whatever the cloud knows."""

    def __init__(self) -> None:
        self.truth: dict[tuple[str, str], tuple[str, int]] = {}
        self.sequence = 0
        self.steps: list[Callable[[Cloud], None]] = []
        for channel in ("home", "office"):
            for name in NAMES:
                self.steps.append(self._connect(channel, name))
            self.steps.append(lambda c, ch=channel: c.begin(ch, 1, ONE))  # type: ignore[misc]
            self._all_commit(channel, 1, ONE)
        self.steps.append(lambda c: c.begin("home", 2, TWO))
        self.steps.append(lambda c: c.begin("office", 2, TWO))
        self._order("office", events.Pin("hall", 1))
        self._report("home", "attic", 2, Outcome.PROGRESS, ONE)
        self._order("home", events.Pause())
        self._all_commit("home", 2, TWO, but="porch")
        self._order("home", events.Resume())
        self._report("home", "porch", 2, Outcome.FAILED, ONE)
        self._order("office", events.Abort("people complain"))
        self.steps.append(lambda c: c.bring("office", 3))
        self._order("home", events.Unbox("porch"))
        self._order("home", events.Bring(Content(1, ONE), gives_up=True, reason="as before"))
        self.steps.append(lambda c: c.bring("home", 3))
        self.steps.append(lambda c: c.begin("home", 4, THREE))
        self._all_commit("home", 4, THREE)

    def _connect(self, channel: str, name: str) -> Callable[[Cloud], None]:
        def connect(cloud: Cloud) -> None:
            student, release = self.truth.setdefault((channel, name), (ONE, 0))
            cloud.driver.connected(channel, name, student=student, release=release)

        return connect

    def _report(
        self, channel: str, name: str, release: int, outcome: Outcome, student: str
    ) -> None:
        self.sequence += 1
        report = Report(name, release, outcome, student, self.sequence)

        def tell(cloud: Cloud) -> None:
            if outcome is Outcome.COMMITTED:
                self.truth[channel, name] = (student, release)
            cloud.driver.report(channel, report)

        self.steps.append(tell)

    def _all_commit(self, channel: str, release: int, student: str, but: str = "") -> None:
        for name in NAMES:
            if name != but:
                self._report(channel, name, release, Outcome.COMMITTED, student)

    def _order(self, channel: str, order: events.Order) -> None:
        self.steps.append(
            lambda c: void(Orders(c.engine).give(channel, order, person="eve", now_ms=1))
        )
        self.steps.append(lambda c: c.driver.tick())


def void(_: object) -> None:
    """Take a value, give none."""


class Cloud:
    """A driver on a real database, and the little of a curator that rollouts need."""

    def __init__(self, path: Path) -> None:
        self.engine: Engine = open_database(path)
        self.driver = RolloutDriver(
            engine=self.engine, clock=lambda: NOW, registry=CollectorRegistry(), plan=PLAN
        )

    def begin(self, channel: str, version: int, student: str) -> None:
        """Begin, unless it has begun."""
        if version > self.driver.state(channel).version:
            self.driver.begin(channel, version, student=student)

    def bring(self, channel: str, version: int) -> None:
        """Roll out what was ordered."""
        wanted = self.driver.wanted(channel)
        if wanted is not None:
            self.begin(channel, version, wanted.content.student)

    def end(self) -> dict[str, Any]:
        """What must be the same, killed or not."""
        return {
            channel: {
                "rollout": [s.version, s.phase, s.wave, s.complete, s.reason, s.student],
                "stable": s.stable and vars(s.stable),
                "wanted": s.wanted() is not None,
                "devices": {
                    n: [d.health, d.wave is None, d.release, d.student, d.pinned, d.strikes]
                    for n, d in sorted(s.devices.items())
                },
                "targets": {n: s.target(n) for n in s.devices},
                "pending": len(Orders(self.engine).pending()),
            }
            for channel, s in sorted(self.driver.states().items())
        }


def play(path: Path, story: Story, answered: int, tell: Callable[[int], None]) -> dict[str, Any]:
    """Go on with a story from a step on."""
    cloud = Cloud(path)
    for channel, name in list(story.truth):
        story._connect(channel, name)(cloud)
    for number, step in enumerate(story.steps[answered:], start=answered):
        step(cloud)
        tell(number + 1)
    end = cloud.end()
    cloud.engine.dispose()
    return end


def killed_at(path: Path, point: int) -> tuple[int, str]:
    """Play in a forked process that is killed at a write; how many steps were answered, and where.

    The place is empty when there were fewer writes.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        writes = 0

        def write(what: str) -> None:
            nonlocal writes
            writes += 1
            if writes > point:
                os.write(writer, f"killed {what}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

        def executes(*arguments: Any) -> None:  # noqa: ANN401 - SQLAlchemy's
            word = arguments[2].split()[0]
            if word in ("INSERT", "UPDATE", "CREATE"):
                write(word)

        event.listen(Engine, "before_cursor_execute", executes)
        event.listen(Engine, "commit", lambda _: write("COMMIT"))

        def tell(number: int) -> None:
            write("answer")
            os.write(writer, f"{number}\n".encode())

        play(path, Story(), 0, tell)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        said = lines.read().split("\n")
    _, status = os.waitpid(child, 0)
    answered = max((int(line) for line in said if line.isdigit()), default=0)
    where = next((line.split()[1] for line in said if line.startswith("killed")), "")
    assert where or os.waitstatus_to_exitcode(status) == 0, "the story itself failed"
    return answered, where


def main(folder: Path) -> None:
    """Kill at every write."""
    expected = play(folder / "whole.sqlite", Story(), 0, lambda _: None)
    kills: Counter[str] = Counter()
    point = 0
    while True:
        path = folder / f"{point}.sqlite"
        answered, where = killed_at(path, point)
        if not where:
            break
        kills[where] += 1
        story = Story()
        for step in story.steps[: answered + 1]:  # a device reports what it has done already
            _remember(step)
        end = play(path, story, answered, lambda _: None)
        assert end == expected, f"killed at write {point} ({where}): {end} is not {expected}"
        point += 1
    print(json.dumps({"kills": kills, "end": expected}))  # noqa: T201


def _remember(step: Callable[[Any], None]) -> None:
    """Let devices know what they ran when the cloud was killed: they did not forget."""

    class Nothing:
        def __getattr__(self, _: str) -> Any:  # noqa: ANN401
            return self

        def __call__(self, *_: object, **__: object) -> Any:  # noqa: ANN401
            return self

    if step.__name__ in ("connect", "tell"):
        step(Nothing())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
