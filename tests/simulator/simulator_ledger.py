"""The truth about a simulated fleet, and what must hold of it after every event.

Nothing here asks the rules what is right: what a device served is noted when it serves it, and a
wave's arithmetic is written out again from the plan's documentation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from cloud.rollout.events import Event, Outcome, Pin, Report, Resume, Tick
from cloud.rollout.plan import REST, Plan, ceil_share
from cloud.rollout.state import Health, Phase, Rollout
from edge.update.machine import MAX_PROBE_STARTS, MAX_STEPS
from edge.update.slots import Entry
from tests.simulator.simulator_scenario import START, Kind

if TYPE_CHECKING:
    from cloud.rollout import state
    from tests.simulator.simulator_device import Device
    from tests.simulator.simulator_world import World

SERVABLE = "no device without a servable student"
SIGNED = "nothing unsigned is ever served"
NEWER = "nothing older is ever served"
WHOLE = "nothing half-written is ever served"
LIMIT = "a bad release never passes its wave's failure limit"
END = "every rollout reaches an end"
EVIDENCE = "no demonstration is lost"
WINDOW = "a device begins only in a window"
AT_ONCE = "no more devices update at once than the plan allows"
HELD = "a pinned device stays, and one in the penalty box is told nothing"
GUARD = "a release that everybody dislikes is halted, and none that all like"
STORED = "what the cloud says is what it stored"

_NOTICED_S = 60.0  # a cloud may be down, or wait for its next tick
_ENDS = (Phase.DONE, Phase.HALTED, Phase.ABORTED)
_OPEN = (Phase.RUNNING, Phase.PAUSED, Phase.DONE)


class BrokenInvariantError(AssertionError):
    """An invariant does not hold; ``invariant`` is one of this module's names."""

    def __init__(self, invariant: str, detail: str) -> None:
        self.invariant = invariant
        super().__init__(f"{invariant}: {detail}")


def needed(plan: Plan, members: int) -> int:
    """How many of a wave's members must have committed before the next wave opens.

    At least ``min_committed`` of them (all, if there are fewer), at least ``min_healthy_share`` of
    them, and at least one.
    """
    return max(1, min(plan.min_committed, members), ceil_share(plan.min_healthy_share, members))


def _in_window(plan: Plan, now: float) -> bool:
    """By the clock on the wall, written out again."""
    hours = 5.5 if plan.time_zone == "Asia/Kolkata" else 0.0
    minutes = int((now + hours * 3600) % 86400) // 60
    wall = f"{minutes // 60:02}:{minutes % 60:02}"
    spans = (window.split("-") for window in plan.windows)
    return any(b <= wall < e if b < e else wall >= b or wall < e for b, e in spans)


def _held_back(rollout: Rollout) -> int:
    """Devices that are there, and have neither begun nor been set aside."""
    return sum(
        d.online
        and d.health is Health.WAITING
        and d.wave is None
        and d.pinned is None
        and not d.boxed_until
        and d.release <= rollout.version
        for d in rollout.devices.values()
    )


class Ledger:
    """Notes what truly happened, and raises :class:`BrokenInvariantError`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._highest: dict[str, int] = defaultdict(int)  # release committed, by device
        self._history: dict[str, set[Entry]] = defaultdict(set)
        self._served_by: dict[str, set[str]] = defaultdict(set)  # devices, by student
        self._made: dict[str, list[str]] = defaultdict(list)
        self._stored = world.cloud.state
        # Of the newest release: each known device's wave and standing, and how many there are.
        self._standing: dict[str, tuple[int, str]] = {}
        self._count: Counter[tuple[int, str]] = Counter()
        self._told: set[str] = set()
        self._completed = 0.0  # when the newest rollout was done
        self._halted = False  # whether it ever was: the guard listens to none that is

    # Devices.

    def serves(self, device: Device, entry: Entry, *, commit: bool) -> None:
        """A device puts a student into service."""
        name, history = device.name, self._history[device.name]
        release = self._world.cloud.releases.get(entry.release)
        provisioned = entry == Entry(device.bundle, 0)
        if not provisioned and (release is None or release.student != entry.student):
            raise BrokenInvariantError(SIGNED, f"{name} serves {entry}")
        if commit and entry.release < self._highest[name]:
            raise BrokenInvariantError(
                NEWER, f"{name} took {entry} after release {self._highest[name]}"
            )
        if not commit and not provisioned and entry not in history:
            raise BrokenInvariantError(NEWER, f"{name} falls back to {entry}, which never served")
        if device.disk.slots.get(entry.student) is not True and not any(
            e.student == entry.student for e in history & {device.before}
        ):
            raise BrokenInvariantError(WHOLE, f"{name} serves {entry}")
        device.before = entry
        history.add(entry)
        self._served_by[entry.student].add(name)
        if commit:
            self._highest[name] = entry.release

    def made(self, device: Device, demonstration: str) -> None:
        """A demonstration is on a device's disk."""
        self._made[device.name].append(demonstration)

    def check(self, device: Device) -> None:
        """Something happened to a device, or to what it sent."""
        disk = device.disk
        pointed = [e for e in (disk.pointer.current, disk.pointer.previous) if e is not None]
        if not any(disk.slots.get(e.student) for e in pointed):
            raise BrokenInvariantError(SERVABLE, f"{device.name} has {disk.slots}, {disk.pointer}")
        if device.serving is not None and device.serving.student not in disk.slots:
            raise BrokenInvariantError(SERVABLE, f"{device.name} deleted what it serves")
        if disk.journal.probe_starts > MAX_PROBE_STARTS or disk.journal.steps > 2 * MAX_STEPS:
            raise BrokenInvariantError(END, f"{device.name} goes round in circles: {disk.journal}")
        stored = self._world.cloud.stored
        for demonstration in self._made.get(device.name, ()):
            if demonstration not in disk.outbox and demonstration not in stored:
                raise BrokenInvariantError(EVIDENCE, demonstration)

    # The rollout.

    def told(self, name: str, target: int) -> None:
        """The cloud sends a device its target."""
        if target != self._stored.target(name):
            raise BrokenInvariantError(STORED, f"{name} is told of {target}")
        after = self._stored
        device = after.devices.get(name)
        by_waves = device is not None and not device.excused and device.pinned is None
        if target == after.version and by_waves:
            self._told.add(name)
            self._check_bad(after)

    def stores(self, after: Rollout) -> None:
        """A state is on the cloud's disk."""
        self._stored = after

    def reloaded(self, found: Rollout) -> None:
        """A restart read the stored state."""
        if found != self._stored:
            raise BrokenInvariantError(STORED, "a restart found another state")
        self._recount(found)  # what the rules decided last may never have been stored

    def steps(
        self, before: Rollout, event: Event, after: Rollout, changed: list[state.Device]
    ) -> None:
        """The rules led from one state to another one."""
        same = after.version == before.version
        self._halted = after.phase is Phase.HALTED or (self._halted and same)
        if after.complete and not (before.complete and same):
            self._completed = self._world.agenda.now
        if after.version != before.version:
            self._told.clear()
            self._recount(after)
        if isinstance(event, Resume):
            self._told.clear()  # what failed gives its places to others
        if isinstance(event, Pin):
            self._told.discard(event.device)  # as does what a person holds
        self._check_bounds(before, after, changed)
        for device in changed:
            self._note(after, device)
        self._check_event(event, before, after)
        self._check_limits(after)
        self._check_waves(before, after)
        self._check_bad(after)
        if after.stable is not None and not self._served_by[after.stable.student]:
            raise BrokenInvariantError(
                LIMIT, f"{after.stable} is called good, and nobody served it"
            )

    def _recount(self, after: Rollout) -> None:
        self._standing.clear()
        self._count.clear()
        for device in after.devices.values():
            self._note(after, device)

    def _note(self, after: Rollout, device: state.Device) -> None:
        if device.health is Health.COMMITTED and device.name not in self._served_by[after.student]:
            raise BrokenInvariantError(LIMIT, f"{device.name} never served release {after.version}")
        old = self._standing.pop(device.name, None)
        if old is not None:
            self._count[old] -= 1
        if device.wave is not None and not device.excused:
            standing = "failed" if device.failed else str(device.health)
            self._standing[device.name] = new = (device.wave, standing)
            self._count[new] += 1

    def _check_event(self, event: Event, before: Rollout, after: Rollout) -> None:
        """What counts as a failure does count."""
        match event:
            case Report(release=after.version, outcome=Outcome.FAILED):
                known = before.devices.get(event.device)
                new = known is None or event.sequence > known.sequence
                if new and not after.devices[event.device].failed:
                    raise BrokenInvariantError(LIMIT, f"{event} did not count")
            case Tick():
                now, plan = self._world.agenda.now, after.plan
                for device in after.devices.values():
                    if device.health is Health.UPDATING and (
                        now - device.heard_at > plan.silence_s
                        or now - device.told_at > plan.total_s
                    ):
                        raise BrokenInvariantError(END, f"{device.name} may be silent for ever")

    def _check_bounds(self, before: Rollout, after: Rollout, changed: list[state.Device]) -> None:
        """Windows, the limit at once, pins and the penalty box."""
        plan, now = after.plan, self._world.agenda.now
        for device in changed:
            old = before.devices.get(device.name)
            fresh = before.version != after.version or old is None or old.wave is None
            begins = device.health is Health.UPDATING and device.wave is not None and fresh
            if begins and plan.windows and not _in_window(plan, now):
                raise BrokenInvariantError(WINDOW, f"{device.name} begins at {now - START:g}")
            aside = device.pinned is not None or device.boxed_until > now
            if begins and aside:
                raise BrokenInvariantError(HELD, f"{device.name} gets a place: {device}")
            if device.pinned is not None and after.target(device.name) not in (0, device.pinned):
                raise BrokenInvariantError(HELD, f"{device.name} leaves its pin: {device}")
        updating = sum(n for (_, s), n in self._count.items() if s == str(Health.UPDATING))
        if begun := [d for d in changed if d.health is Health.UPDATING]:
            known = before.devices
            more = any(d.name not in known or known[d.name].wave is None for d in begun)
            if plan.max_updating and more and updating > plan.max_updating:
                raise BrokenInvariantError(AT_ONCE, f"{updating} devices update")
        if after.by_guard and not before.by_guard:
            dislike = {s for s, k in self._world.kinds.items() if k is Kind.DISLIKED}
            if after.student not in dislike:
                raise BrokenInvariantError(GUARD, f"{after.student}: {after.reason}")

    def _check_limits(self, after: Rollout) -> None:
        """While devices are told, failures are below both limits of the plan."""
        plan, count = after.plan, self._count
        waves = range(len(plan.waves))
        members = [sum(n for (w, _), n in count.items() if w == wave) for wave in waves]
        for wave in waves:
            if plan.waves[wave] != REST and members[wave] > plan.capacity(wave, len(after.devices)):
                raise BrokenInvariantError(LIMIT, f"wave {wave} holds {members[wave]} devices")
        if after.phase not in _OPEN:
            return
        failed = sum(count[wave, "failed"] for wave in waves)
        settled = failed + sum(count[wave, "committed"] for wave in waves)
        if failed >= plan.halt_failures and failed >= plan.halt_share * settled:
            raise BrokenInvariantError(LIMIT, f"{failed} of {settled} failed, and it goes on")
        failed, size = count[after.wave, "failed"], members[after.wave]
        room = plan.capacity(after.wave, len(after.devices)) - size
        size += int(min(room, _held_back(after)))
        if failed and not after.complete and size - failed < needed(plan, size):
            raise BrokenInvariantError(LIMIT, f"{failed} of wave {after.wave}'s {size} failed")

    def _check_waves(self, before: Rollout, after: Rollout) -> None:
        """A wave that is through was served by as many of its devices as the plan wants."""
        if after.version != before.version and not after.version:
            return
        first = before.wave if after.version == before.version else 0
        through = list(range(first, after.wave))
        if after.complete and not (before.complete and after.version == before.version):
            through.append(after.wave)
        for wave in through:
            names = [name for name, (w, _) in self._standing.items() if w == wave]
            served = sum(name in self._served_by[after.student] for name in names)
            if served < needed(after.plan, len(names)) and (names or wave == 0):
                raise BrokenInvariantError(
                    LIMIT, f"wave {wave} is through, {served} of its {len(names)} served it"
                )

    def _check_bad(self, after: Rollout) -> None:
        """A release that no device can serve stays in its first wave, and within its size."""
        if self._world.kind(after.student) not in (Kind.BAD, Kind.DEADLY):
            return
        room = after.plan.capacity(0, len(after.devices))
        if after.wave > 0 or after.complete or len(self._told) > room:
            raise BrokenInvariantError(
                LIMIT, f"release {after.version} reached {len(self._told)} devices"
            )

    # The end.

    def finish(self) -> None:
        """Faults stopped, and much time has passed."""
        world = self._world
        rollout = world.cloud.state
        if not self.ended():
            raise BrokenInvariantError(
                END, f"release {rollout.version} is {rollout.phase} in wave {rollout.wave}"
            )
        for name, demonstrations in self._made.items():
            for demonstration in demonstrations:
                if demonstration not in world.cloud.stored:
                    raise BrokenInvariantError(EVIDENCE, f"{demonstration} is still on {name}")
        self._check_guard(rollout)

    def _check_guard(self, rollout: Rollout) -> None:
        """Where all was well and nothing is any more, on several devices, it must have been seen.

        All judgements before are good and all after are bad, so of any of them the first eight are.
        """
        cloud = self._world.cloud
        took = {d.name for d in rollout.devices.values() if d.wave is not None and d.committed_at}
        before: Counter[str] = Counter()
        after: list[str] = []
        in_time = (j for j in cloud.judgements if j.at <= self._completed - _NOTICED_S)
        for judged in in_time:
            if judged.device in took and judged.student != rollout.student:
                if judged.corrected:
                    return
                before[judged.device] += 1
            elif judged.device in took and judged.at >= rollout.began_at:
                if not judged.corrected:
                    return
                after.append(judged.device)
        first = Counter(after[:8])
        several = sum(first[d] >= 2 for d in first)
        clear = len(after) >= 8 and several >= 2 and all(before[d] >= 3 for d in first)
        if clear and rollout.phase is Phase.DONE and not self._halted:
            raise BrokenInvariantError(GUARD, f"release {rollout.version}: {before} and {first}")

    def ended(self) -> bool:
        """Whether the newest release's rollout has come to an end."""
        cloud = self._world.cloud
        newest = max(cloud.releases, default=0)
        if newest == 0:
            return True
        rolled_back = cloud.state.wanted() is None
        return cloud.state.version == newest and cloud.state.phase in _ENDS and rolled_back

    def all_stored(self) -> bool:
        """Whether every demonstration is in the cloud."""
        stored = self._world.cloud.stored
        return all(d in stored for made in self._made.values() for d in made)
