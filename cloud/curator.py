"""Turns evidence into releases: looks, decides by the policy, runs a job, publishes what passes.

Everything it needs to go on after a crash is in the job folders and the database.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from cloud import jobs as job_rules
from cloud import lessons
from cloud.adapt import Spec
from cloud.curator_metrics import CuratorMetrics
from cloud.gate.gate import GateConfig
from cloud.learners.config import DEFAULT, LearnerConfig
from cloud.policy import PolicyConfig, Situation, decide
from cloud.rollout.state import Phase
from cloud.students.candidates import DELTA_SHARE
from edge.student.bundle import WEIGHTS, digest, sha256_file
from protos.errors import InvalidInputError
from protos.v1 import device_pb2, release_pb2

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from prometheus_client import CollectorRegistry

    from cloud.evidence.store import EvidenceStore
    from cloud.jobs import Job, Jobs
    from cloud.releases.store import Release, ReleaseStore
    from cloud.rollout.driver import RolloutDriver
    from protos.prompt import Shown

log = logging.getLogger("anabranch.curator")

_CANARIES = 6
_ATTEMPTS = 3
_LOOKED_AT = 5000  # the latest demonstrations; older ones no longer say how a home is


@dataclass(frozen=True)
class CuratorConfig:
    """When to adapt, how to learn, what to ask of a candidate, and what devices check.

    ``probe_equal_share`` (0..1) of the canaries must come out as the gate saw them on the device,
    each within ``probe_seconds``. ``delta_share`` is the most that an update by products may take,
    of the bytes of the weights; 0: every changed code is sent.
    """

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    learner: LearnerConfig = field(default_factory=partial(LearnerConfig.named, DEFAULT))
    gate: GateConfig = field(default_factory=GateConfig)
    threads: int = 2
    probe_equal_share: float = 0.6
    probe_seconds: float = 30.0
    delta_share: float = DELTA_SHARE


class Curator:
    """Adapts one channel; all methods from one thread at a time.

    Args:
        channel: the channel.
        bundle: the imported student, the first release.
        masters: its fp32 weights.
        evidence: what devices said.
        releases: where candidates become releases.
        driver: rolls them out.
        jobs: the adaptations.
        config: when and how.
        registry: where metrics go.
    """

    def __init__(
        self,
        *,
        channel: str,
        bundle: Path,
        masters: Path,
        evidence: EvidenceStore,
        releases: ReleaseStore,
        driver: RolloutDriver,
        jobs: Jobs,
        config: CuratorConfig,
        registry: CollectorRegistry,
    ) -> None:
        self._channel = channel
        self._bundle = bundle
        self._masters = masters
        self._evidence = evidence
        self._releases = releases
        self._driver = driver
        self._jobs = jobs
        self._config = config
        self._metrics = CuratorMetrics(registry)
        self._reason = ""
        self._ended = {job.name for job in jobs.all() if job.result is not None}

    def begin(self) -> None:
        """At the start of the process: the first release, and what a crash interrupted."""
        latest = self._releases.latest(self._channel)
        if latest is None:
            above = max((d.release for d in self._evidence.devices(self._channel)), default=0)
            latest = self._releases.publish(
                self._bundle,
                channel=self._channel,
                canaries=(),
                bounds=self._bounds(),
                above=above,
            )
            log.info("release %d: the imported student %s", latest.version, latest.student[:12])
        self._check_base(latest)
        self._roll_out(latest)

    def _check_base(self, latest: Release) -> None:
        """Refuse another student than the releases here began with: codes hang on its scales."""
        found = (self._releases.find(self._channel, v) for v in range(1, latest.version + 1))
        first = next(r for r in found if r is not None)
        began = {f.name: f.sha256 for f in first.manifest.files}
        if began[WEIGHTS] != sha256_file(self._bundle / WEIGHTS):
            msg = (
                f"the releases of channel {self._channel!r} began with student "
                f"{first.student[:12]}, and {self._bundle.parent} holds another one: give that "
                "student as --student, or begin anew with another --state"
            )
            raise InvalidInputError(msg)

    def tick(self) -> None:
        """Look once: go on with a job, publish a result, or decide to begin."""
        self._bring()
        self._roll_out(self._releases.latest(self._channel))
        jobs = self._jobs.all()
        if self._jobs.running():
            progress = jobs[-1].progress or {}
            fraction = float(progress.get("fraction", 0.0))
            self._metrics.fraction.labels(self._channel).set(fraction)
            return
        self._metrics.fraction.labels(self._channel).set(0)
        job = jobs[-1] if jobs else None
        if job is not None and job.result is None:
            self._again(job)
        elif job is not None and job.result and not job.result["passed"] and self._first(job):
            self._refused(job.result)
        elif job is not None and job.result and job.result["passed"] and job.version is None:
            self._publish(job, job.result)
        else:
            self._consider(jobs)

    def _again(self, job: Job) -> None:
        """Run a job that a crash interrupted, but not one that crashes whenever it runs."""
        if self._jobs.disk_full:
            return
        if self._jobs.tries.get(job.name, 0) >= _ATTEMPTS:
            job.failed(f"its process ended {_ATTEMPTS} times without a result; see log.txt")
            return
        log.info("job %s has no result: it runs again", job.name)
        self._jobs.start(job)

    def _first(self, job: Job) -> bool:
        """Whether this end of a job is news."""
        news = job.name not in self._ended
        self._ended.add(job.name)
        return news

    def _refused(self, result: dict[str, Any]) -> None:
        """Show a job that came to no release."""
        kind = "failed" if "error" in result else "refused"
        self._metrics.adaptations.labels(self._channel, kind).inc()
        if kind == "refused":
            self._show(result)
        log.warning("no release: %s", result.get("error") or f"the gate says {result['checks']}")

    def _bring(self) -> None:
        """Publish what a person ordered, or what an abort has to undo, and roll it out."""
        wanted = self._driver.wanted(self._channel)
        if wanted is None:
            return
        rollout, latest = self._driver.state(self._channel), self._releases.latest(self._channel)
        if latest and latest.version > rollout.version and latest.student == wanted.content.student:
            return  # it is there, and waits to be signed
        if rollout.phase == "aborted":
            self._releases.withdraw(self._channel, rollout.version)
        self._releases.republish(self._channel, wanted.content.version)
        log.warning("bringing the content of release %d", wanted.content.version)

    def _roll_out(self, release: Release | None) -> None:
        """Begin a rollout, unless it has begun or devices would not believe the release yet."""
        if release is None or not release.signed:
            return
        if release.version > self._driver.state(self._channel).version:
            devices = [d.device for d in self._evidence.devices(self._channel)]
            self._driver.begin(
                self._channel, release.version, student=release.student, devices=devices
            )

    def _bounds(self) -> release_pb2.ProbeBounds:
        return release_pb2.ProbeBounds(
            min_equal_share=self._config.probe_equal_share, max_seconds=self._config.probe_seconds
        )

    def _consider(self, jobs: list[Job]) -> None:
        alive = self._alive()
        used, last = job_rules.used(jobs, alive)
        fresh = self._fresh(used)
        self._metrics.unlearned.labels(self._channel).set(len(fresh))
        decision = decide(self._situation(jobs, alive, {d.id for d in fresh}), self._config.policy)
        kind = re.sub(r"\d+", "", decision.reason)
        if kind != self._reason:  # the numbers in it grow with every demonstration
            log.info("policy: %s", decision.reason)
            self._reason = kind
        if decision.adapt:
            self._adapt(used, last, fresh)

    def _alive(self) -> set[int]:
        """Versions that were not withdrawn."""
        latest = self._releases.latest(self._channel)
        versions = range(1, latest.version + 1) if latest else range(0)
        found = (self._releases.find(self._channel, v) for v in versions)
        return {r.version for r in found if r is not None and not r.withdrawn}

    def _fresh(self, used: job_rules.Used) -> list[device_pb2.Demonstration]:
        latest = self._releases.latest(self._channel)
        learned = latest.manifest.learned_from if latest else ()
        taken = {*used.learnt, *used.held_out, *used.left_out, *learned}
        rows = self._evidence.demonstrations(self._channel, limit=_LOOKED_AT)
        alarms = lessons.alarms(self._evidence.drift_reports(self._channel))
        # Who says again what is held out says nothing new; learnt, it would test nothing any more.
        held = set(map(lessons.shown, self._by_ids(used.held_out)))
        newest = [d for d in lessons.newest_each(rows, taken) if lessons.shown(d) not in held]
        return lessons.worth_learning(newest, alarms)

    def _situation(self, jobs: list[Job], alive: set[int], fresh: Collection[str]) -> Situation:
        rollout = self._driver.state(self._channel)
        devices = {d.device: d.student for d in self._evidence.devices(self._channel)}
        # A commit is told to the rollout first; the birth that says so here may come after it.
        devices |= {n: d.student for n, d in rollout.devices.items() if n in devices and d.student}
        reports = self._evidence.drift_reports(self._channel)
        drifted = {r.device for r in reports if devices.get(r.device) == r.student}
        unfinished = {"running", "paused"}
        busy = f"rollout of release {rollout.version}" if rollout.phase in unfinished else ""
        latest = self._releases.latest(self._channel)
        if latest is not None and not latest.signed:
            busy = f"release {latest.version} waits to be signed"
        last = jobs[-1] if jobs else None
        failed = left = 0
        if last is not None:
            # What still counts of it: old evidence falls out of view.
            ours = {*last.evidence.learn, *last.evidence.held_out}.intersection(fresh)
            left = len(set(last.evidence.waiting).intersection(fresh))
            if last.version not in alive:
                # Its gate refused it, or people did: the same would lead to the same again.
                failed, left = len(ours) + left, 0
        return Situation(len(devices), len(drifted), len(fresh), busy, failed, left)

    def _adapt(
        self,
        used: job_rules.Used,
        last: Job | None,
        fresh: list[device_pb2.Demonstration],
    ) -> None:
        latest = self._releases.latest(self._channel)
        assert latest is not None  # noqa: S101  # begin() published one
        held_out = set(used.held_out)
        settled = self._by_ids([*used.learnt, *used.held_out])
        rows = self._evidence.demonstrations(self._channel, limit=_LOOKED_AT)
        found = lessons.divide(
            fresh,
            [(d, d.id in held_out) for d in settled],
            lessons.shown,
            self._config.learner.most_lessons,
            confirmed=(
                d
                for d in rows
                if d.source == device_pb2.SOURCE_CONFIRMATION and d.student == latest.student
            ),
        )
        spec = Spec(
            masters=self._masters.absolute(),
            learnt=last.learnt.absolute() if last else None,
            base=self._bundle.absolute(),
            current=self._releases.bundle_folder(self._channel, latest.version).absolute(),
            train=tuple(map(lessons.shown, found.learn)),
            held_out=tuple(map(lessons.shown, found.held_out)),
            replay=tuple(map(lessons.shown, found.replay)),
            earlier=tuple(map(lessons.shown, found.earlier)),
            threads=self._config.threads,
            learner=self._config.learner,
            gate=self._config.gate,
            release=latest.version,
            delta_share=self._config.delta_share if self._holds(latest, last) else 0.0,
        )
        job = self._jobs.create(spec, found.evidence)
        parts = (found.learn, found.waiting, found.held_out, found.replay, found.earlier)
        log.info(
            "job %s: %d demonstrations to learn (%d more wait), %d held out, %d replayed, "
            "%d earlier",
            *(job.name, *map(len, parts)),
        )
        self._jobs.start(job)

    def _holds(self, latest: Release, last: Job | None) -> bool:
        """Whether the release in service holds what learning goes on from.

        After a rollback it may be another one's content: nothing can then be added to its codes.
        """
        if last is None or last.result is None:
            return latest.student == digest(self._bundle)
        return bool(last.result["student"] == latest.student)

    def _by_ids(self, ids: Collection[str]) -> list[device_pb2.Demonstration]:
        return self._evidence.demonstrations(self._channel, only=ids)

    def _publish(self, job: Job, result: dict[str, Any]) -> None:
        """Make a release of a job that passed; safe to repeat after a crash in the middle."""
        self._show(result)
        release = self._made_of(job, result) or self._make(job, result)
        self._roll_out(release)
        job.published(release.version)
        self._metrics.adaptations.labels(self._channel, "released").inc()
        log.info(
            "release %d: student %s, delta %.1f MB of %.1f MB",
            release.version,
            release.student[:12],
            release.delta_bytes / 1e6,
            release.full_bytes / 1e6,
        )

    def _made_of(self, job: Job, result: dict[str, Any]) -> Release | None:
        """The release that was made of a job already, before a crash."""
        latest = self._releases.latest(self._channel)
        if latest is None or latest.student != result["student"]:
            return None
        # A student may come out as the one before it; what it learnt from tells them apart.
        learnt = set(latest.manifest.learned_from)
        return None if learnt.isdisjoint(job.evidence.learn) else latest

    def _make(self, job: Job, result: dict[str, Any]) -> Release:
        spec = Spec.from_json((job.folder / "spec.json").read_text())
        right = job_rules.answered(spec, result)
        known = {*right, *job_rules.learnt(spec, result)}
        # Not only the job's: what others said alike, before or since, is in these weights as well.
        rows = self._by_ids([*job.evidence.learn, *job.evidence.held_out])
        rows += self._evidence.demonstrations(self._channel, limit=_LOOKED_AT)
        latest = self._releases.latest(self._channel)
        earlier = latest.manifest.learned_from if latest else ()
        return self._releases.publish(
            job.candidate,
            channel=self._channel,
            canaries=[_canary(d) for d in right[:_CANARIES]],
            bounds=self._bounds(),
            learned_from=dict.fromkeys(
                [*earlier, *(d.id for d in rows if lessons.shown(d) in known)]
            ),
            gate=[release_pb2.GateCheck(**c) for c in result["checks"]],
            fallback=self._fallback(),
            updates=job.updates if latest and latest.version == spec.release else (),
        )

    def _fallback(self) -> int:
        """What a rollback of the next release would bring back; 0: nothing."""
        rollout = self._driver.state(self._channel)
        if rollout.complete and rollout.phase not in (Phase.HALTED, Phase.ABORTED):
            return rollout.version
        return rollout.stable.version if rollout.stable else 0

    def _show(self, result: dict[str, Any]) -> None:
        self._metrics.seconds.labels(self._channel).set(result["sdft_seconds"])
        if "peak_mb" in result:  # results before 0.2 have neither
            self._metrics.memory.labels(self._channel).set(result["peak_mb"] * 1e6)
        if result.get("teacher") is not None:
            self._metrics.teacher.labels(self._channel).set(result["teacher"]["gain"])
        for check in result["checks"]:
            self._metrics.value.labels(self._channel, check["name"]).set(check["value"])
            self._metrics.bound.labels(self._channel, check["name"]).set(check["bound"])


def _canary(shown: Shown) -> release_pb2.Canary:
    messages = [device_pb2.ChatMessage(role=m.role, content=m.content) for m in shown.messages]
    return release_pb2.Canary(messages=messages, answer=shown.answer)
