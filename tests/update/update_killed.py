"""Devices that are killed, or fail, at every call that changes their disk, and what comes of it.

Run by ``test_update_killed.py`` in a process of its own, which forks one child for each life of a
device. Prints one JSON object for each fault: where it struck, and what the next lives came to.

    update_killed.py FOLDER PART PARTS
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
from collections import deque
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.student.bundle import FILES
from edge.update import client
from edge.update.journal import Journal, Record
from edge.update.machine import MAX_PROBE_STARTS, MAX_STEPS, RESTING, TABLE, Event, State
from protos.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge.update.machine import Transition
    from tests.update.update_disk import DEADLY, Call, Disk, Fault, die, faults_at
    from tests.update.update_scenarios import SCENARIOS, UNTIL_COMMIT, Ledger, Scenario
    from tests.update.update_simulator import Agent, World
else:
    from update_disk import DEADLY, Call, Disk, Fault, die, faults_at
    from update_scenarios import SCENARIOS, UNTIL_COMMIT, Ledger, Scenario
    from update_simulator import World

KILLED_IN = {
    **dict.fromkeys(UNTIL_COMMIT, "a good release"),
    State.COMMITTED: "a good release",
    State.ROLLING_BACK: "a student that fails its probe",
    State.FAILED: "a student that fails its probe",
    State.INCONSISTENT: "a rollback that fails",
}
ENOUGH = 3 * MAX_STEPS
LAST = 3
"""A release that every device must be able to take in the end."""


PLAIN = Scenario(ends=(LAST,))


@dataclass(frozen=True)
class Beginning:
    """A device's folder, and what happens to it from there on."""

    name: str
    scenario: Scenario
    folder: Path
    killed_in: State | None = None


def in_child(life: Callable[[], object]) -> Any:  # noqa: ANN401 # whatever JSON holds
    """Run a life in a child process; its result, or None when it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said: object = None
        try:
            said = life()
        except BaseException as error:  # noqa: BLE001 # a child must not run on as its parent
            said = {"error": repr(error)}
        finally:
            with os.fdopen(writer, "w") as file:
                file.write(json.dumps(said))
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        heard = file.read()
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else json.loads(heard)


def watch(disk: Disk) -> None:
    """Let ``disk`` know which transition is written, and in which state the client works."""
    enter, write = client.enter, Journal.write
    entered: list[str] = []

    def noted(record: Record, event: Event, **kwargs: Any) -> tuple[Record, Transition]:  # noqa: ANN401
        after, step = enter(record, event, **kwargs)
        if TABLE[record.state, event] is not step:  # the loop breaker made something else of it
            dead = record.state is State.PROBING and record.probe_starts >= MAX_PROBE_STARTS
            event = Event.PROBE_FAILED if dead else Event.FATAL
        entered[:] = [f"{record.state.name} {event.name}"]
        return after, step

    def writing(journal: Journal, record: Record) -> None:
        disk.writing = entered.pop() if entered else "reports were taken"
        try:
            write(journal, record)
            disk.state = record.state.name
        finally:
            disk.writing = ""

    setattr(client, "enter", noted)  # noqa: B010 # only this child's
    setattr(Journal, "write", writing)  # noqa: B010


class Device:
    """One device, its cloud, and its lives."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._world = World(root)
        self._heard, self._wiped = root / "heard", root / "wiped"
        self._world.cloud = self._ledger = self._published = Ledger(self._heard)

    def publish(self, scenario: Scenario) -> None:
        """What the cloud has in this scenario, and a good release for afterwards."""
        self._world.cloud = self._ledger = self._published = Ledger(self._heard)
        self._world.publish(LAST)
        scenario.publish(self._world)

    def begin(self, folder: Path) -> None:
        """Go back to what :meth:`keep` kept."""
        for name in ("state", "heard", "wiped"):
            there, kept = self._root / name, folder / name
            shutil.rmtree(there, ignore_errors=True)
            there.unlink(missing_ok=True)
            if kept.is_dir():
                shutil.copytree(kept, there)
            elif kept.exists():
                shutil.copy(kept, there)

    def keep(self, folder: Path) -> Path:
        """Keep the device's disk, what the cloud was told and what was wiped."""
        folder.mkdir(parents=True)
        for name in ("state", "heard", "wiped"):
            there = self._root / name
            if there.is_dir():
                shutil.copytree(there, folder / name)
            elif there.exists():
                shutil.copy(there, folder / name)
        return folder

    def live(self, scenario: Scenario, *, at: int = 0, fault: Fault | None = None) -> object:
        """A life with a fault at the call of number ``at``; which calls there were."""
        self._connect(self._published.target)
        self._world.state.mkdir(exist_ok=True)
        disk = Disk(self._world.state, at=at, fault=fault)
        watch(disk)
        try:
            agent = self._start(scenario)
        except StorageError:
            assert scenario.unprovisioned, "it did not start"
        else:
            for _ in range(2):
                with suppress(StorageError):  # the journal could not be written
                    agent.update()
            assert not agent.student.closed, "nobody serves"
        return {"calls": [asdict(call) for call in disk.calls]}

    def die_in(self, scenario: Scenario, state: State) -> object:
        """A life that ends as soon as the journal says ``state``."""
        write = Journal.write

        def write_and_die(journal: Journal, record: Record) -> None:
            write(journal, record)
            if record.state is state:
                die()

        setattr(Journal, "write", write_and_die)  # noqa: B010 # only this child's
        self._connect(self._published.target)
        self._start(scenario).update()
        return {}

    def wear(self) -> None:
        """Let the journal have counted so many steps that something must be wrong."""
        journal = Journal(self._world.state / "update" / "journal.json")
        journal.write(replace(journal.read(), steps=MAX_STEPS))

    def alter(self) -> None:
        """Let the disk have changed the new slot's weights."""
        record = Journal(self._world.state / "update" / "journal.json").read()
        (self._world.state / "slots" / record.student / "weights.bin").write_bytes(b"altered")

    def serve_at_once(self, *, full: bool = False) -> object:
        """A start without the cloud, and with a full disk: people are answered all the same."""
        if full:
            Disk(self._world.state, at=-1, fault=Fault.FULL)
        self._connect(0)
        self._ledger.online = False
        agent = self._world.agent()
        serving = agent.client.status.serving
        assert agent.student.digest == serving.student, "another student than it says"
        assert serving.student in self._world.digests, "a student that nobody made"
        return {}

    def survive(self, scenario: Scenario) -> object:
        """The lives after: without the cloud, with it, and with a release for all."""
        if not scenario.unprovisioned:
            self.serve_at_once()
        self._end(scenario)
        for release in (1, LAST)[not scenario.again :]:
            self._take(release)
        return {}

    def _end(self, scenario: Scenario) -> None:
        """The life with the cloud, and what it comes to."""
        self._connect(scenario.then)
        agent = self._start(PLAIN if scenario.passes else scenario)
        settle(agent)
        if agent.client.status.state == "inconsistent":
            assert not agent.student.closed, "nobody serves"
            self._connect(scenario.then)
            agent = self._start(PLAIN)
            settle(agent)
        release = agent.check().release
        assert release in scenario.ends, f"it ended with release {release}"
        assert agent.client.status.state == "idle", agent.client.status
        told = self._ledger.heard()
        committed = [version for version, state in told if state is State.COMMITTED]
        if len(scenario.ends) == 1 and scenario.then:
            assert committed == [r for r in scenario.ends if r], told
            assert self._wiped.exists() == bool(committed)
            failures = [s for _, s in told if s in (State.FAILED, State.INCONSISTENT)]
            assert sorted(set(failures)) == sorted(failures), told
            assert bool(failures) != bool(committed) or scenario.ends == (2,), told

    def _take(self, release: int) -> None:
        """A life in which all is well: the device comes to the release, and is tidy."""
        self._connect(release)
        agent = self._start(PLAIN)
        settle(agent)
        assert agent.check().release == release, "it is stuck"
        told = self._ledger.heard()
        assert told.count((release, State.COMMITTED)) == 1, told
        state, pointer = self._world.state, agent.slots.pointer()
        pointed = [e.student for e in (pointer.current, pointer.previous) if e]
        files = {p.relative_to(state).as_posix() for p in state.rglob("*") if p.is_file()}
        believed = {f for f in files if f.startswith("trust/") and f.endswith(".json")}
        assert files - believed == {
            "slots/pointer.json",
            "update/journal.json",
            *(f"slots/{student}/{name}" for student in pointed for name in FILES),
        }

    def _connect(self, target: int) -> None:
        """The cloud as it was published, without what goes wrong in a scenario."""
        fresh = copy(self._published)
        fresh.target, fresh.faults = target, deque()
        self._world.cloud = self._ledger = fresh

    def _start(self, scenario: Scenario) -> Agent:
        agent = self._world.agent()
        agent.room = scenario.room

        def remember() -> None:
            self._wiped.touch()

        agent.hooks["wipe"] = remember
        scenario.arm(self._world, agent)
        return agent


def settle(agent: Agent) -> None:
    """Update, and go on until the cloud took every report."""
    agent.update()
    while agent.client._record.reports:
        agent.update()


def strike(device: Device, beginning: Beginning, at: int, fault: Fault) -> str:
    """One fault at one call, and the lives after; what was wrong, if anything."""
    scenario = beginning.scenario
    device.begin(beginning.folder)
    lived = in_child(lambda: device.live(scenario, at=at, fault=fault))
    if (lived is None) != (fault in DEADLY):
        return "it was not killed" if lived else "it was killed"
    heard = [lived or {}]
    if fault is Fault.FULL and not scenario.unprovisioned:
        heard.append(in_child(partial(device.serve_at_once, full=True)))
    heard.append(in_child(partial(device.survive, scenario)))
    return next((str(said["error"]) for said in heard if "error" in said), "")


def beginnings(device: Device, root: Path) -> Iterator[Beginning]:
    """Each scenario from its start, from a kill in each state, and with a worn journal."""
    fresh = root / "fresh"
    fresh.mkdir()
    in_child(device.serve_at_once)
    provisioned = device.keep(root / "provisioned")
    for name, scenario in SCENARIOS.items():
        device.publish(scenario)
        yield Beginning(name, scenario, fresh if scenario.unprovisioned else provisioned)
    for state in State:
        name = KILLED_IN.get(state)
        if name is None:
            continue
        scenario = SCENARIOS[name]
        device.publish(scenario)
        device.begin(provisioned)
        assert in_child(lambda s=scenario, x=state: device.die_in(s, x)) is None, state
        folder = device.keep(root / state.name)
        # Who is killed in PROBING a second time has failed.
        after = replace(scenario, ends=(0, 1)) if state is State.PROBING else scenario
        yield Beginning(f"{name}, killed in {state.name}", after, folder, state)
        if state in (State.PROBING, State.COMMITTED):
            device.begin(folder)
            in_child(device.alter)
            altered = device.keep(root / f"{state.name}-altered")
            yield Beginning(f"{name}, altered in {state.name}", after, altered)
        if state not in RESTING:
            device.begin(folder)
            in_child(device.wear)
            worn = device.keep(root / f"{state.name}-worn")
            old = replace(scenario, ends=(0,))
            yield Beginning(f"{name}, killed in {state.name} too often", old, worn)


def endure(device: Device, beginning: Beginning, state: State) -> dict[str, object]:
    """Lives that all end as soon as the journal says ``state``, until one goes on."""
    device.begin(beginning.folder)
    # Only fetching may be begun for ever: a device that is switched off every night.
    scenario = replace(beginning.scenario, ends=(1,) if state is State.FETCHING else (0,))
    died = 0
    while died < ENOUGH and in_child(partial(device.die_in, beginning.scenario, state)) is None:
        died += 1
    said = in_child(partial(device.survive, scenario))
    return {"endured": state.name, "died": died, "wrong": str(said.get("error", ""))}


def main(root: Path, part: int, parts: int) -> None:
    """Strike, look, tell: every call once, in the first beginning in which it is made."""
    logging.disable(logging.CRITICAL)
    gc.freeze()
    device = Device(root)
    seen: set[Call] = set()
    for number, beginning in enumerate(beginnings(device, root)):
        state = beginning.killed_in
        if state is not None and state not in RESTING and number % parts == part:
            sys.stdout.write(json.dumps(endure(device, beginning, state)) + "\n")
        device.begin(beginning.folder)
        lived = in_child(partial(device.live, beginning.scenario))
        before: Call | None = None
        for at, made in enumerate(lived["calls"], 1):
            call = Call(**made)
            known, faults = call in seen, faults_at(call, before)
            seen.add(call)
            before = call
            if known or at % parts != part:
                continue
            for fault in faults:
                wrong = strike(device, beginning, at, fault)
                line = {"beginning": beginning.name, "at": at, "fault": fault.name, "wrong": wrong}
                sys.stdout.write(json.dumps(made | line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
