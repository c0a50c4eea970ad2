"""A simulated device's update client: :mod:`edge.update.client` without threads, on virtual time.

What :class:`edge.update.work.Work` does with files happens here to dictionaries, each step after a
while, so that a crash comes between any two of them. Table, record and what they decide are real.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from edge.link.policy import full_jitter
from edge.update.decide import MAX_DISK_TRIES, MAX_STRIKES, enter, news
from edge.update.machine import RESTING, Action, Event, State
from edge.update.slots import Entry, Pointer
from tests.simulator.simulator_scenario import Bug, Kind, Release

if TYPE_CHECKING:
    from tests.simulator.simulator_device import Device

_TAKES = {
    Action.FETCH: 0.2,
    Action.VERIFY: 0.5,
    Action.APPLY: 2.0,
    Action.PROBE: 2.0,
    Action.COMMIT: 0.3,
    Action.RESTORE: 0.3,
}
_CUTTABLE = (Action.FETCH, Action.VERIFY, Action.APPLY, Action.PROBE)


class Updating:
    """The update client of one run of a device's process: what is in it, a crash forgets."""

    def __init__(self, device: Device) -> None:
        self.record = device.disk.journal
        self._device = device
        self._world = device.world
        self._disk = device.disk
        self._target: int | None = None
        self._wanted: int | None = None
        self._busy = self._delivering = False
        self._resume = True
        self._waits = self._disk_tries = self._pauses = 0
        self._paused: Action | None = None
        self._making = False

    def hear(self, target: int) -> None:
        """The cloud, or who pretends to be it, says what it wants this device to run."""
        self._target = target
        if not self._busy:
            self.settle()
        elif self._paused is not None:
            self._go_on(self._paused)

    def settle(self) -> None:
        """Resume what was going on, and take the wanted release if there is one."""
        event = Event.RESUMED if self._resume else self._news()
        self._resume = True
        if event is not None:
            self._busy = True
            self._advance(event)
        else:
            self._rest()

    @property
    def _serving(self) -> Entry:
        assert self._device.serving is not None
        return self._device.serving

    def _rest(self) -> None:
        self._busy = False
        self._deliver()
        self._resume = self.record.state not in RESTING

    def _news(self) -> Event | None:
        record = self.record
        if Bug.FORGETS_FLOOR in self._world.bugs:
            record = replace(record, floor=0)
        event = news(record, target=self._target, serving=self._serving.release)
        if event is Event.TARGET:
            self._wanted = self._target
        return event

    def _advance(self, event: Event | None) -> None:
        """Journal, then act."""
        event = event or self._news()
        if event is None:
            self._rest()
            return
        now_ms = int((self._world.agenda.now + self._device.skew) * 1000)
        record, step = enter(
            self.record,
            event,
            target=self._wanted,
            serving=self._serving,
            delta_bytes=self._disk.parts,
            now_ms=now_ms,
        )
        if self._disk.full and self._world.random.random() < 0.5:
            # StorageError out of settle(): the client resumes from the journal after a while.
            self._busy = False
            self._resume = True
            self._device.later(self._world.random.uniform(1.0, 10.0), self._settle_if_idle)
            return
        self._world.log("{}: {} on {!s}", self._device.name, step.state.name, event.name)
        self._disk.journal = record
        self.record = record
        if step.report is not None:
            self._deliver()
        self._waits = self._disk_tries = 0
        action = None
        for wanted in step.actions:
            if wanted is Action.CLEAN:
                self._clean()
            elif wanted in _TAKES:
                action = wanted
        if action is not None:
            self._perform(action)
        else:
            self._advance(Event.FINISHED if step.state is State.FAILED else None)

    def _settle_if_idle(self) -> None:
        if not self._busy:
            self.settle()

    def _perform(self, action: Action) -> None:
        if action in _CUTTABLE and (heard := self._news()) is not None:
            self._advance(heard)
            return
        if action is Action.APPLY:
            self._begin_slot()
        act = getattr(self, f"_{action.name.lower()}")
        self._device.later(_TAKES[action] * self._world.random.uniform(0.5, 1.5), act)

    def _done(self, action: Action, event: Event) -> None:
        # A release that was withdrawn during its probe must not get into service.
        self._advance((self._news() if action in _CUTTABLE else None) or event)

    def _again(self, action: Action) -> None:
        """After a failure: full jitter, or until the cloud is heard."""
        seconds = full_jitter(self._waits, base_s=1.0, cap_s=20.0, random=self._world.random)
        self._waits += 1
        self._pauses += 1
        self._paused, number = action, self._pauses
        self._device.later(
            seconds,
            lambda: self._go_on(action) if self._paused and self._pauses == number else None,
        )

    def _go_on(self, action: Action) -> None:
        self._paused = None
        self._perform(action)

    def _fail(self, action: Action, detail: str) -> None:
        self.record = replace(self.record, detail=detail)
        self._advance(Event.PROBE_FAILED if action is Action.PROBE else Event.FATAL)

    def _distrust(self, detail: str) -> None:
        strikes = self.record.strikes + 1
        self.record = replace(self.record, strikes=strikes)
        if strikes >= MAX_STRIKES:
            self._fail(Action.FETCH, detail)
        else:
            self._advance(Event.REFETCH)

    def _fetch(self) -> None:
        kept = self._disk.manifest
        if kept is not None and kept.version == self.record.release:
            self._fetch_parts(kept)
            return
        self._device.call(
            partial(self._world.manifest, self.record.release),
            self._believe,
            partial(self._again, Action.FETCH),
        )

    def _believe(self, release: Release | None) -> None:
        if self.record.state is not State.FETCHING:
            return
        if release is None:
            self._distrust("the cloud has no such release")
            return
        if not release.signed and Bug.TRUSTS_ANYBODY not in self._world.bugs:
            self._fail(Action.FETCH, "no right signature")
            return
        if release.version != self.record.release:
            if Bug.TRUSTS_ANYBODY not in self._world.bugs:
                self._fail(Action.FETCH, "another release's manifest")
                return
            self.record = replace(self.record, release=release.version)
        self._disk.manifest = release
        self._fetch_parts(release)

    def _fetch_parts(self, release: Release) -> None:
        record, failed = self.record, self.record.failed
        if release.student == failed.student and record.release <= failed.release:
            self._fail(Action.FETCH, "its student failed before")
            return
        self.record = replace(record, student=release.student)
        if self._device.has(release.student):
            self._done(Action.FETCH, Event.FETCHED)
            return
        if (heard := self._news()) is not None:
            self._advance(heard)
        elif self._disk.parts < 2:
            self._device.call(self._world.part, self._take_part, partial(self._again, Action.FETCH))
        else:
            self._done(Action.FETCH, Event.FETCHED)

    def _take_part(self, _: object) -> None:
        if self.record.state is State.FETCHING and self._disk.manifest is not None:
            self._disk.parts += 1
            self._fetch_parts(self._disk.manifest)

    def _verify(self) -> None:
        if self._world.random.random() < self._world.wrong_bytes:
            self._disk.parts = 0
            self._distrust("wrong bytes")
        else:
            self._done(Action.VERIFY, Event.VERIFIED)

    def _begin_slot(self) -> None:
        """The first half of the work on the disk; a crash may leave it at that."""
        student = self.record.student
        self._making = not self._device.has(student)
        if not self._making:
            return
        if Bug.BUILDS_IN_PLACE in self._world.bugs:
            self._disk.slots[self._serving.student] = False
        beside = student if Bug.TRUSTS_FOLDERS in self._world.bugs else f"{student}.tmp"
        self._disk.slots[beside] = False

    def _apply(self) -> None:
        if self._disk.full:
            self._disk_tries += 1
            if self._disk_tries >= MAX_DISK_TRIES:
                self._disk.parts = 0
                self._fail(Action.APPLY, "the disk is full")
            else:
                self._again(Action.APPLY)
            return
        if self._making:
            student = self.record.student
            self._disk.slots.pop(f"{student}.tmp", None)
            self._disk.slots[student] = True
            if Bug.BUILDS_IN_PLACE in self._world.bugs:
                self._disk.slots[self._serving.student] = True
        self._done(Action.APPLY, Event.APPLIED)

    def _probe(self) -> None:
        student = self.record.student
        kind = self._world.kind(student)
        if kind is Kind.DEADLY:
            self._device.crash()
        elif kind is Kind.BAD or not self._device.has(student):
            self._fail(Action.PROBE, "the probe failed")
        else:
            self._done(Action.PROBE, Event.PROBED)

    def _commit(self) -> None:
        """The swap. Pointer, wipe and the next journal entry are steps of their own."""
        new = Entry(self.record.student, self.record.release)
        if self._serving.student != new.student and not self._device.opens(new):
            self._fail(Action.COMMIT, "the new student cannot be opened any more")
            return
        self._device.serve(new, commit=True)
        self._device.later(0.1, self._point)

    def _point(self) -> None:
        record, pointer = self.record, self._disk.pointer
        new = Entry(record.student, record.release)
        if pointer.current != new:
            other = record.base.student != new.student
            self._disk.pointer = Pointer(new, record.base if other else pointer.previous)
        self._device.later(0.1, self._committed)

    def _committed(self) -> None:
        record = self.record
        self.record = replace(record, floor=max(record.floor, record.release))
        self._advance(Event.FINISHED)

    def _restore(self) -> None:
        base = self.record.base
        if self._serving.student != base.student and not self._device.opens(base):
            self._fail(Action.RESTORE, "the student before is damaged")
            return
        self._device.serve(base, commit=False)
        self._device.later(0.1, self._point_back)

    def _point_back(self) -> None:
        if self._disk.pointer.current != self.record.base:
            self._disk.pointer = Pointer(self.record.base, None)
        self._advance(Event.FINISHED)

    def _clean(self) -> None:
        disk, pointer = self._disk, self._disk.pointer
        disk.parts, disk.manifest = 0, None
        kept = {e.student for e in (pointer.current, pointer.previous, self._serving) if e}
        for student in [s for s in disk.slots if s not in kept]:
            del disk.slots[student]

    def _deliver(self) -> None:
        """Send what the cloud has still to hear, oldest first."""
        if self._delivering or not self.record.reports:
            return
        self._delivering = True
        report = self.record.reports[0]

        def failed() -> None:
            self._delivering = False
            self._device.later(self._world.random.uniform(1.0, 10.0), self._deliver)

        def taken(_: object) -> None:
            self._delivering = False
            waiting = tuple(r for r in self.record.reports if r.sequence != report.sequence)
            self.record = replace(self.record, reports=waiting)
            if not waiting and self.record.state in RESTING:
                self._disk.journal = self.record
            self._deliver()

        self._device.call(
            partial(self._world.cloud.report, self._device.name, report), taken, failed
        )
