"""The update client: takes one release after another through the machine, on its own threads.

:mod:`edge.update.machine` says what follows, :mod:`edge.update.work` does it, and this module joins
them: it writes the journal first, tries again what may heal, and tells the cloud.

Each try after a failure waits with full jitter. A cloud that does not answer is asked for ever; a
disk that fails and bytes that are wrong are given up after a bounded number of tries.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic

from edge.link.policy import full_jitter
from edge.update.decide import MAX_DISK_TRIES, MAX_STRIKES, enter, news
from edge.update.fetch import Downloads
from edge.update.journal import Journal
from edge.update.machine import RESTING, Action, Event, State
from edge.update.metrics import UpdateMetrics
from edge.update.work import Device, StudentT, Work
from protos.errors import (
    AnabranchError,
    ExpiredError,
    IntegrityError,
    InvalidInputError,
    SignatureError,
    StorageError,
    UnavailableError,
    WrongBaseError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

    from prometheus_client import CollectorRegistry

    from edge.update.plan import Download
    from edge.update.slots import Entry, Slots
    from edge.update.transport import Transport
    from edge.update.trust import TrustedReleases

_log = logging.getLogger(__name__)
_CUTTABLE = (Action.FETCH, Action.VERIFY, Action.APPLY, Action.PROBE)


@dataclass(frozen=True)
class Status:
    """What the client is doing, for people: ``fetched`` and ``to_fetch`` are bytes."""

    state: str
    serving: Entry
    release: int
    detail: str
    fetched: int
    to_fetch: int


class UpdateClient(Generic[StudentT]):
    """Keeps the student of one device at the release that the cloud wants it to run."""

    def __init__(
        self,
        *,
        state: Path,
        slots: Slots,
        serving: Entry,
        device: Device[StudentT],
        transport: Transport,
        trusted: TrustedReleases,
        clock: Callable[[], float],
        random: Random,
        registry: CollectorRegistry,
        progress: Callable[[str, int, int], None] | None = None,
        backoff_base_s: float = 1.0,
        backoff_cap_s: float = 60.0,
    ) -> None:
        """Take up what the journal says; nothing happens before :meth:`start` or :meth:`settle`.

        Args:
            state: the device's state folder.
            slots: the same that ``serving`` was started from.
            serving: what :meth:`Slots.start` opened.
            device: the agent's side.
            transport: the cloud's side.
            trusted: which manifests to believe.
            clock: seconds since the epoch.
            random: for jitter.
            registry: where the metrics go.
            progress: called with the kind of download, bytes fetched and bytes in all.
            backoff_base_s: bound of the first wait, in seconds; it doubles.
            backoff_cap_s: bound of any wait.

        Raises:
            StorageError: the journal cannot be read.
        """
        self._journal = Journal(state / "update" / "journal.json")
        self._record = self._journal.read()
        self._metrics = UpdateMetrics(registry)
        self._metrics.entered(self._record.state)
        self._transport = transport
        self._trusted = trusted
        self._clock = clock
        self._random = random
        self._progress = progress
        self._backoff = (backoff_base_s, backoff_cap_s)
        self._changed = threading.Condition()
        self._target: int | None = None
        self._wanted: int | None = None
        self._stopping = False
        self._resume = True
        self._probed: Event | None = None  # how a probe ended that the journal does not know of
        self._waits_for = ""
        self._heard = 0
        self._moved = 0
        self._threads: list[threading.Thread] = []
        self._work = Work(
            device=device,
            slots=slots,
            downloads=Downloads(state / "downloads"),
            manifest_file=state / "update" / "manifest",
            serving=serving,
            transport=transport,
            trusted=trusted,
            interrupted=lambda: self._stopping or self._news() is not None,
            took=self._took,
            unloaded=self._unloaded,
        )
        self._do = {
            Action.FETCH: self._work.fetch,
            Action.VERIFY: self._work.verify,
            Action.APPLY: self._work.apply,
            Action.PROBE: self._work.probe,
            Action.COMMIT: self._work.commit,
            Action.RESTORE: self._work.restore,
        }

    @property
    def status(self) -> Status:
        """A snapshot."""
        record = self._record
        fetched, to_fetch = self._work.sizes()
        name = record.state.name.lower()
        waits_for = "" if record.state in RESTING else self._waits_for
        detail = record.detail or waits_for
        return Status(name, self._work.serving, record.release, detail, fetched, to_fetch)

    def freshness(self) -> None:
        """See that the cloud still renews its metadata, though it may not speak of a release.

        Somebody who holds the watch stream back is noticed so: the gauge stands still.
        """
        try:
            self._metrics.fresh_until.set(self._trusted.refresh())
        except ExpiredError:  # it was logged
            self._metrics.expired.inc()
        except AnabranchError as error:
            _log.info("asking for fresh metadata again later: %s", error)

    def start(self) -> None:
        """Begin to watch and to update, on two threads."""
        self._threads = [
            threading.Thread(target=self._watch, name="update-watch", daemon=True),
            threading.Thread(target=self._run, name="update", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop at the next safe moment; the journal knows how to go on."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._transport.close()
        for thread in self._threads:
            thread.join()
        self._work.close_candidate()

    def announce(self, target: int) -> None:
        """The cloud wants this device to run release ``target`` (0: nothing to do)."""
        with self._changed:
            self._target = target
            self._heard += 1
            self._changed.notify_all()

    def settle(self) -> None:
        """Resume what was going on, take the wanted release if there is one, go on until at rest.

        Raises:
            StorageError: the journal cannot be written; the next call resumes.
        """
        event = self._again() if self._resume else self._news()
        self._resume = True
        try:
            while event is not None and not self._stopping:
                event = self._advance(event) or self._news()
            self._deliver()
            self._resume = self._record.state not in RESTING
        finally:
            self._work.close_candidate()

    def _again(self) -> Event:
        """How to go on where it stopped: a journal on a full disk is no reason to probe anew."""
        return (self._news() or self._probed) if self._probed is not None else Event.RESUMED

    def _advance(self, event: Event) -> Event | None:
        """Take one step: journal, then act. None when there is no more to do."""
        if event is Event.TARGET:
            self._work.close_candidate()
        record, step = enter(
            self._record,
            event,
            target=self._wanted,
            serving=self._work.serving,
            delta_bytes=self._work.sizes()[0],
            now_ms=int(self._clock() * 1000),
        )
        self._probed = event if event in (Event.PROBED, Event.PROBE_FAILED) else None
        self._journal.write(record)
        self._record, self._probed = record, None
        self._metrics.entered(step.state)
        if step.report is not None:
            self._tell(step.report)
            self._deliver()
        following: Event | None = None
        for action in step.actions:
            if action is Action.CLEAN:
                self._clean()
            elif action in self._do:
                following = self._perform(action)
        return Event.FINISHED if step.state is State.FAILED else following

    def _tell(self, state: State) -> None:
        record = self._record
        if state is State.COMMITTED:
            self._metrics.updates.labels("committed").inc()
        elif state in (State.FAILED, State.INCONSISTENT):
            self._metrics.updates.labels("failed").inc()
        told = _log.warning if record.detail else _log.info
        told("release %d: %s %s", record.release, state.name.lower(), record.detail)

    def _perform(self, action: Action) -> Event | None:
        """Do an action until it leads somewhere; None when stopping."""
        waits = disk = 0
        while not self._stopping:
            if action in _CUTTABLE and (heard := self._news()) is not None:
                return heard
            moved = self._moved
            try:
                event, self._record = self._do[action](self._record)
                self._waits_for = ""
                if event is None:
                    continue
                # A release that was withdrawn during its probe must not get into service.
                return (self._news() if action in _CUTTABLE else None) or event
            except UnavailableError as error:
                waits = 0 if self._moved > moved else waits
                self._waits_for = str(error)
                if isinstance(error, ExpiredError):
                    self._metrics.expired.inc()
                _log.info("waiting for the cloud: %s", error)
            except StorageError as error:
                disk += 1
                if disk >= MAX_DISK_TRIES:
                    self._work.free_space()
                    return self._fail(action, error)
                _log.warning("trying again: %s", error)
            except (IntegrityError, InvalidInputError) as error:
                return self._distrust(action, error)
            except Exception as error:  # noqa: BLE001 # the agent's and the runtime's own kinds
                return self._fail(action, error)
            self._pause(waits)
            waits += 1
        return None

    def _distrust(self, action: Action, error: AnabranchError) -> Event:
        """Bytes were wrong: once more, then without deltas, then not at all."""
        record = self._record
        if action not in (Action.FETCH, Action.VERIFY, Action.APPLY) or isinstance(
            error, SignatureError
        ):
            return self._fail(action, error)
        strikes = record.strikes + 1
        useless = action is Action.APPLY or isinstance(error, WrongBaseError)
        if self._work.has_delta and not record.full and (useless or strikes >= MAX_STRIKES):
            self._record = replace(record, full=True, strikes=0)
            _log.warning("release %d: full files instead of a delta: %s", record.release, error)
        elif strikes >= MAX_STRIKES:
            return self._fail(action, error)
        else:
            self._record = replace(record, strikes=strikes)
            _log.warning("release %d: fetching again: %s", record.release, error)
            self._pause(strikes)
        return Event.REFETCH

    def _fail(self, action: Action, error: Exception) -> Event:
        detail = str(error) if isinstance(error, AnabranchError) else repr(error)
        self._record = replace(self._record, detail=detail)
        return Event.PROBE_FAILED if action is Action.PROBE else Event.FATAL

    def _news(self) -> Event | None:
        """What the cloud's target means for what is going on."""
        target = self._target
        event = news(self._record, target=target, serving=self._work.serving.release)
        if event is Event.TARGET:
            self._wanted = target  # the one that was judged: another may be announced meanwhile
        return event

    def _took(self, download: Download, size: int) -> None:
        self._moved += size
        self._metrics.fetched.labels(download.kind).inc(size)
        if self._progress is not None:
            self._progress(download.kind, *self._work.sizes())

    def _unloaded(self) -> None:
        self._metrics.unloads.inc()
        _log.warning(
            "there is no memory for two students: the one in service was closed first, "
            "requests wait for the new one"
        )

    def _clean(self) -> None:
        try:
            self._work.clean()
        except (OSError, StorageError) as error:  # costs space, not the update
            _log.warning("could not clean up: %s", error)

    def _deliver(self) -> None:
        """Send queued reports; what cannot be sent now waits in the journal."""
        waiting = self._record.reports
        for done, report in enumerate(waiting):
            try:
                self._transport.report(report.message())
            except UnavailableError:
                self._record = replace(self._record, reports=waiting[done:])
                return
            except (InvalidInputError, IntegrityError) as error:
                _log.warning("the cloud refused a report: %s", error)
        if waiting:
            self._record = replace(self._record, reports=())
            if self._record.state in RESTING:
                self._journal.write(self._record)

    def _run(self) -> None:
        fails = 0
        while not self._stopping:
            try:
                self.settle()
                fails = fails + 1 if self._record.reports else 0
            except StorageError as error:
                _log.warning("the update waits: %s", error)
                fails += 1
            except Exception:  # noqa: BLE001 # a fault of ours must not end all updates to come
                _log.exception("the update stumbled; it is resumed from the journal")
                fails += 1
            if fails:
                self._pause(fails)
            else:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopping or self._news() is not None)

    def _watch(self) -> None:
        fails = 0
        while not self._stopping:
            serving = self._work.serving
            try:
                for target in self._transport.watch(
                    student=serving.student, release=serving.release
                ):
                    fails = 0
                    self.announce(target)
            except AnabranchError as error:
                if not self._stopping:
                    _log.info("watching again later: %s", error)
            except Exception:  # noqa: BLE001 # a fault of ours must not end all updates to come
                _log.exception("watching stumbled; it begins again")
            self._pause(fails)
            fails += 1

    def _pause(self, fails: int) -> None:
        """Wait with full jitter, or until the client is stopped or the cloud is heard."""
        base, cap = self._backoff
        seconds = full_jitter(fails, base_s=base, cap_s=cap, random=self._random)
        with self._changed:
            heard = self._heard
            self._changed.wait_for(lambda: self._stopping or self._heard != heard, timeout=seconds)
