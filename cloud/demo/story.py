"""The demo's story: a fleet learns a skill, its homes change, it drifts, learns and recovers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloud.demo.commands import sample
from cloud.demo.people import exact_match
from edge.student.runtime import Student

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from rich.progress import Progress, TaskID

    from cloud.demo.commands import Command
    from cloud.demo.homes import Home
    from cloud.demo.people import Household
    from cloud.demo.record import Record
    from cloud.demo.town import Town
    from cloud.jobs import Job

SKILL_A, SKILL_B = "lights", "media"
TESTS = 34  # unseen commands of each skill in each home: 102 in all
_LEARN, _STEADY, _SHIFT, _AFTER = 72, 30, 90, 20  # commands a home at most
_LULL_S = 1.0  # between the commands of a home while an update is on its way
_KEPT = 10  # after the shift one command in so many is still of the old skill
_SPARE = 30  # commands drawn beside those needed: some are too like a test
_EMPTY = frozenset({"please", "can", "could", "you", "the", "my", "our"})
_CHUNK = 16
_LEARN_S = 1200

Said = tuple[str, "Command"]


@dataclass(frozen=True)
class Script:
    """What the people of one home will say: no two commands of it are the same.

    ``tests`` are asked only to measure and never told; the rest is (skill, command) by phase.
    """

    tests: dict[str, list[Command]]
    learn: list[Said]
    steady: list[Said]
    shift: list[Said]
    after: list[Said]


def write_scripts(
    homes: Sequence[Home], rng: random.Random, written: Callable[[], None] = lambda: None
) -> list[Script]:
    """Draw what the people of each home will say, and the tests.

    Nobody anywhere says a test, nor a test with another "the", "my" or "please".

    Args:
        homes: who lives where.
        rng: chooses.
        written: is called for each home that is done.

    Raises:
        ValueError: the templates do not give enough commands.
    """
    counts = {SKILL_A: _LEARN + _STEADY + _SHIFT // _KEPT + _AFTER, SKILL_B: _SHIFT + _AFTER}
    pools: list[dict[str, list[Command]]] = []
    for home in homes:
        pool = {s: sample(s, home, TESTS + n + _SPARE, rng) for s, n in counts.items()}
        pools.append(pool)
        written()
    tests: list[dict[str, list[Command]]] = []
    tested: set[str] = set()
    for pool in pools:
        tests.append({})
        for skill, commands in pool.items():
            fresh = {gist(c.text): c for c in commands if gist(c.text) not in tested}
            chosen = dict(list(fresh.items())[:TESTS])
            tests[-1][skill] = list(chosen.values())
            tested |= chosen.keys()
    return [
        _script(
            own, {s: [c for c in cs if gist(c.text) not in tested] for s, cs in pool.items()}, rng
        )
        for own, pool in zip(tests, pools, strict=True)
    ]


def gist(text: str) -> str:
    """A command without the words that change nothing.

    >>> gist("Please turn on the kettle!") == gist("turn on my kettle")
    True
    """
    return " ".join(w for w in re.findall(r"[\w%°]+", text.casefold()) if w not in _EMPTY)


def _script(
    tests: dict[str, list[Command]], pool: dict[str, list[Command]], rng: random.Random
) -> Script:
    drawn = {skill: iter(commands) for skill, commands in pool.items()}

    def take(skill: str, count: int) -> list[Said]:
        taken = [(skill, c) for c in itertools.islice(drawn[skill], count)]
        if len(taken) < count:
            msg = f"{len(taken)} {skill} commands are left for a phase that has {count}"
            raise ValueError(msg)
        return taken

    learn, steady = take(SKILL_A, _LEARN), take(SKILL_A, _STEADY)
    shift = [
        said
        for _ in range(_SHIFT // _KEPT)
        for said in (*take(SKILL_B, _KEPT - 1), *take(SKILL_A, 1))
    ]
    after = take(SKILL_A, _AFTER // 2) + take(SKILL_B, _AFTER - _AFTER // 2)
    rng.shuffle(after)
    return Script(tests, learn, steady, shift, after)


class Story:
    """Plays the script in the town.

    Args:
        town: everything runs in it.
        scripts: by the town's households, in their order.
        record: where what happens is written down.
        progress: bars of what takes long.
    """

    def __init__(
        self, town: Town, scripts: Sequence[Script], record: Record, progress: Progress
    ) -> None:
        self._town = town
        self._homes = list(zip(town.households, scripts, strict=True))
        self._record = record
        self._progress = progress
        self.jobs: list[Job] = []
        self.versions: list[int] = []

    async def play(self) -> None:
        """From devices that know nothing to a fleet that knows both skills.

        Raises:
            DemoError: something did not come about.
        """
        await self._learn("learn", SKILL_A, lambda s: s.learn)
        await self._measure("skill_a_before", SKILL_A)
        await self._measure("skill_b_before", SKILL_B)
        await self._live("steady", lambda s: s.steady)
        await self._learn("shift", SKILL_B, lambda s: s.shift)
        await self._measure("skill_a_after", SKILL_A)
        await self._measure("skill_b_after", SKILL_B)
        await self._live("after", lambda s: s.after)

    async def _learn(self, phase: str, skill: str, part: Callable[[Script], list[Said]]) -> None:
        """People ask and correct until the cloud learns; then its release reaches all devices."""
        number = len(self.jobs) + 1
        left = await self._live(phase, part, until=lambda: self._town.job(number) is not None)
        with self._bar("waiting for the cloud to begin", None):
            await self._town.processes.until(
                lambda: self._town.job(number) is not None,
                "the cloud to begin an adaptation (were there too few corrections?)",
                seconds=60,
            )
        job = self._town.job(number)
        assert job is not None  # noqa: S101  # waited for above
        self.jobs.append(job)
        count = len(job.evidence.learn) + len(job.evidence.held_out)
        self._record.add("job", name=job.name, state="learning", demonstrations=count)
        if skill == SKILL_B:
            await self._measure_with_memory("skill_b_memory", SKILL_B)
        version = await self._follow(job)
        self._record.add("job", name=job.name, state="done", demonstrations=count)
        await self._roll_out(version, left)

    async def _live(
        self,
        phase: str,
        part: Callable[[Script], list[Said]],
        until: Callable[[], bool] | None = None,
    ) -> dict[str, list[Said]]:
        """Let people say a part of their script; returns what was not said."""
        self._town.begin(phase)
        whole = {h.device: list(part(s)) for h, s in self._homes}
        total = sum(map(len, whole.values()))
        with self._bar(f"{phase}: people ask and correct", total) as task:

            async def talk(household: Household) -> None:
                said = whole[household.device]
                while said and not (until and until()):
                    skill, command = said.pop(0)
                    await self._town.say(household, command, skill)
                    self._progress.advance(task)

            async with asyncio.TaskGroup() as group:
                for household, _ in self._homes:
                    group.create_task(talk(household))
        return whole

    async def _follow(self, job: Job) -> int:
        """Show an adaptation until its release is there."""
        version: int | None = None
        with self._bar(f"adaptation {job.name}", 1.0) as task:

            def done() -> bool:
                nonlocal version
                note = job.progress or {}
                phase = str(note.get("phase", "starting"))
                self._progress.update(
                    task,
                    completed=float(note.get("fraction", 0.0)),
                    description=f"adaptation {job.name}: {phase}",
                )
                version = self._town.released(job)
                return version is not None

            await self._town.processes.until(done, f"adaptation {job.name}", seconds=_LEARN_S)
        assert version is not None  # noqa: S101  # waited for above
        self.versions.append(version)
        self._record.add("release", version=version)
        return version

    async def _roll_out(self, version: int, left: dict[str, list[Said]]) -> None:
        """People go on asking, slowly, while the release reaches their devices."""
        with self._bar(f"release {version}: rollout", None):
            rollout = asyncio.create_task(self._town.settle(version))

            async def talk(household: Household) -> None:
                while not rollout.done() and left[household.device]:
                    skill, command = left[household.device].pop(0)
                    await self._town.say(household, command, skill)
                    await asyncio.sleep(_LULL_S)

            try:
                async with asyncio.TaskGroup() as group:
                    for household, _ in self._homes:
                        group.create_task(talk(household))
                await rollout
            finally:
                rollout.cancel()

    async def _measure(self, name: str, skill: str) -> None:
        """Exact match on unseen commands: each device's own file, without working memory."""
        right = count = 0
        asked: dict[str, list[Command]] = {}
        served: dict[str, Path] = {}
        digests = await asyncio.to_thread(self._town.digests)
        for household, script in self._homes:  # devices with equal files share a session
            content = digests[household.device]
            served[content] = self._town.serving(household)
            asked.setdefault(content, []).extend(script.tests[skill])
        total = sum(map(len, asked.values()))
        with self._bar(f"{name}: unseen {skill} commands", total) as task:
            for content, commands in asked.items():
                student = Student.open(served[content], threads=2)
                try:
                    for start in range(0, len(commands), _CHUNK):
                        part = commands[start : start + _CHUNK]
                        right += await asyncio.to_thread(exact_match, student, part)
                        count += len(part)
                        self._progress.update(task, completed=count)
                finally:
                    student.close()
        self._record.add("measure", name=name, skill=skill, right=right, count=count)

    async def _measure_with_memory(self, name: str, skill: str) -> None:
        """Exact match on unseen commands as the device answers them: with its working memory."""
        rights: list[bool] = []
        total = sum(len(s.tests[skill]) for _, s in self._homes)
        with self._bar(f"{name}: unseen {skill} commands", total) as task:

            async def ask(household: Household, commands: list[Command]) -> None:
                for command in commands:
                    asked = await household.ask(command, store=False)
                    rights.append(asked is not None and asked.right)
                    self._progress.advance(task)

            async with asyncio.TaskGroup() as group:
                for household, script in self._homes:
                    group.create_task(ask(household, script.tests[skill]))
        self._record.add("measure", name=name, skill=skill, right=sum(rights), count=len(rights))

    @contextlib.contextmanager
    def _bar(self, what: str, total: float | None) -> Iterator[TaskID]:
        """A bar that stays, full, when its work is done; a line where there is no terminal."""
        if not self._progress.console.is_terminal:
            self._progress.console.print(f"{self._record.now:6.0f} s  {what}")
        task = self._progress.add_task(what, total=total)
        yield task
        shown = self._progress.tasks[self._progress.task_ids.index(task)]
        self._progress.update(task, total=shown.completed or 1, completed=shown.completed or 1)
        self._progress.stop_task(task)
