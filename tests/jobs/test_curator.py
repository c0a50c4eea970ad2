"""The curator's decisions on a real store; the jobs' results are written by the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from cloud.adapt import NO_ROOM, Spec
from cloud.curator import Curator, CuratorConfig
from cloud.db import open_database
from cloud.evidence.store import EvidenceStore
from cloud.guarding import Guarding
from cloud.jobs import Job, Jobs
from cloud.learners.config import LearnerConfig
from cloud.policy import PolicyConfig
from cloud.releases import ceremony, keys
from cloud.releases.store import ReleaseStore
from cloud.rollout.driver import RolloutDriver
from cloud.rollout.events import Abort, Bring, Outcome, Report, Resume
from cloud.rollout.plan import Plan
from cloud.rollout.state import Content, Phase
from cloud.students.candidates import DELTA_SHARE
from edge import delta
from edge.student.bundle import digest
from protos.errors import InvalidInputError, StorageError
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cloud.releases.store import Release
    from tests.jobs.jobs_evidence import (
        CONFIRMATION,
        demonstration,
        demonstrations,
        drift,
        finish,
        write_bundle,
    )
else:
    from jobs_evidence import (
        CONFIRMATION,
        demonstration,
        demonstrations,
        drift,
        finish,
        write_bundle,
    )


class StillProcess:
    """Does nothing, and ends when the test says so."""

    code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.code = 1

    def wait(self) -> int:
        return self.code or 0


class StillJobs(Jobs):
    """Jobs whose processes do nothing."""

    def __init__(self, folder: Path, *, clock: Callable[[], float]) -> None:
        super().__init__(folder, clock=clock)
        self.started: list[str] = []

    def _spawn(self, job: Job) -> StillProcess:
        self.started.append(job.name)
        self.process = StillProcess()
        return self.process

    def end(self, code: int = 0) -> Job:
        self.process.code = code
        return self.all()[-1]


class Cloud:
    """All of a cloud but its processes and servers. ``restart`` is what a crash leaves."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.student = write_bundle(folder / "student" / "bundle")
        self.engine = open_database(folder / "cloud.sqlite")
        self.now = 1_700_000_000.0
        self.restart()

    def restart(self, **config: Any) -> None:  # noqa: ANN401
        self.registry = CollectorRegistry()
        clock = lambda: self.now  # noqa: E731
        self.evidence = EvidenceStore(self.engine, clock=clock)
        self.releases = ReleaseStore(
            folder=self.folder,
            engine=self.engine,
            clock=clock,
            registry=self.registry,
        )
        self.driver = RolloutDriver(engine=self.engine, clock=clock, registry=self.registry)
        self.jobs = StillJobs(self.folder / "jobs", clock=clock)
        self.curator = Curator(
            channel="home",
            bundle=self.student,
            masters=self.folder / "student" / "masters",
            evidence=self.evidence,
            releases=self.releases,
            driver=self.driver,
            jobs=self.jobs,
            config=CuratorConfig(policy=PolicyConfig(demonstrations=20), **config),
            registry=self.registry,
        )
        self.curator.begin()

    def latest(self) -> Release:
        found = self.releases.latest("home")
        assert found is not None
        return found

    def deliver(self) -> None:
        """Every device runs the latest release: its rollout is done."""
        release = self.latest()
        for name in ("lamp-1", "lamp-2"):
            birth = device_pb2.Birth(
                channel="home", device=name, session=1, student=release.student
            )
            self.evidence.birth(birth)
            self.driver.connected("home", name, student=release.student, release=release.version)
        self.driver.tick()
        assert self.driver.state("home").phase is Phase.DONE

    def hear(self, given: Sequence[device_pb2.Demonstration], *, alarm: bool = True) -> None:
        """Evidence about the student in service."""
        student = self.latest().student
        for d in given:
            d.student = student
        self.evidence.add(given)
        if alarm:
            self.evidence.add_drift([drift(student=student)])

    def adapt(self, given: Sequence[device_pb2.Demonstration]) -> Job:
        """Devices drift, and a job runs."""
        self.hear(given)
        self.curator.tick()
        assert self.jobs.running()
        return self.jobs.end()

    def learn(
        self,
        job: Job,
        *,
        changed: int = 1,
        right: bool = True,
        left_out: Sequence[int] = (),
        unseen: Sequence[int] = (),
    ) -> None:
        """The job's process writes a candidate, and that its gate passed."""
        write_bundle(job.candidate, changed=changed)
        answer = "right" if right else "wrong"
        finish(job, digest(job.candidate), answer, left_out=left_out, unseen=unseen)

    def counted(self, result: str) -> float | None:
        labels = {"channel": "home", "result": result}
        return self.registry.get_sample_value("anabranch_adaptations_total", labels)

    def unlearned(self) -> float | None:
        labels = {"channel": "home"}
        return self.registry.get_sample_value("anabranch_demonstrations_unlearned", labels)

    def versions(self) -> list[int]:
        return [v for v in range(1, 10) if self.releases.find("home", v) is not None]


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path)
    made.deliver()
    yield made
    made.engine.dispose()


def test_the_imported_student_is_the_first_release_and_only_once(cloud: Cloud) -> None:
    assert cloud.latest().student == digest(cloud.student)
    cloud.restart()
    assert cloud.versions() == [1]
    assert cloud.driver.state("home").version == 1


def test_another_student_on_the_same_state_is_refused(cloud: Cloud, tmp_path: Path) -> None:
    cloud.student = write_bundle(tmp_path / "other" / "bundle", changed=5)
    with pytest.raises(InvalidInputError, match="began with student"):
        cloud.restart()


def test_nothing_begins_without_drift_or_with_too_little_to_learn(cloud: Cloud) -> None:
    cloud.hear(demonstrations(30), alarm=False)
    cloud.curator.tick()
    assert cloud.jobs.all() == []
    assert (
        cloud.registry.get_sample_value("anabranch_demonstrations_unlearned", {"channel": "home"})
        == 30
    )


def test_a_job_gets_its_evidence_and_passes_into_a_release(cloud: Cloud) -> None:
    given = demonstrations(24)
    job = cloud.adapt(given)
    assert len(job.evidence.learn) == 16
    assert {*job.evidence.learn, *job.evidence.held_out} == {d.id for d in given}
    cloud.learn(job)
    cloud.curator.tick()
    release = cloud.latest()
    assert release.version == job.version == 2
    assert release.student == digest(job.candidate)
    assert set(release.manifest.learned_from) == {d.id for d in given}
    assert len(release.manifest.canaries) == 6
    assert {c.answer for c in release.manifest.canaries} == {"right"}
    assert [c.name for c in release.manifest.gate] == ["new"]
    assert cloud.driver.state("home").version == 2
    assert cloud.counted("released") == 1
    cloud.deliver()
    cloud.curator.tick()
    assert len(cloud.jobs.all()) == 1  # all is learnt


def test_what_was_held_out_and_answered_wrong_stays_in_working_memory(cloud: Cloud) -> None:
    job = cloud.adapt(demonstrations(24))
    cloud.learn(job, right=False)
    cloud.curator.tick()
    assert set(cloud.latest().manifest.learned_from) == set(job.evidence.learn)
    assert not cloud.latest().manifest.canaries


def test_what_others_said_alike_is_learnt_as_well(cloud: Cloud) -> None:
    given = demonstrations(24)
    twin = demonstration(given[0].messages[0].content, "right", device="lamp-2", created_ms=5)
    confirmed = demonstration(given[1].messages[0].content, "right", source=CONFIRMATION)
    contrary = demonstration(given[2].messages[0].content, "wrong", created_ms=6)
    job = cloud.adapt([twin, contrary, *given, confirmed])
    cloud.learn(job)
    late = demonstration(given[3].messages[0].content, "right", device="lamp-2")
    cloud.hear([late])  # made while the job ran
    cloud.curator.tick()
    learned = set(cloud.latest().manifest.learned_from)
    assert learned == {d.id for d in [*given, twin, confirmed, late]}
    cloud.deliver()
    cloud.curator.tick()
    assert cloud.unlearned() == 0


@pytest.mark.parametrize("rolled_out", [False, True])
def test_a_crash_before_published_json_makes_no_second_release(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, *, rolled_out: bool
) -> None:
    job = cloud.adapt(demonstrations(24))
    cloud.learn(job)

    def crash(*_: object, **__: object) -> None:
        message = "killed"
        raise StorageError(message)

    with monkeypatch.context() as killed:
        if rolled_out:
            killed.setattr(Job, "published", crash)
        else:
            killed.setattr(RolloutDriver, "begin", crash)
        with pytest.raises(StorageError):
            cloud.curator.tick()
    assert cloud.versions() == [1, 2]
    assert job.version is None
    cloud.restart()
    cloud.curator.tick()
    cloud.curator.tick()
    assert cloud.versions() == [1, 2]
    assert job.version == 2
    assert cloud.driver.state("home").version == 2


def test_a_student_that_came_out_as_before_is_a_release_of_its_own(cloud: Cloud) -> None:
    first = cloud.adapt(demonstrations(24))
    cloud.learn(first)
    cloud.curator.tick()
    cloud.deliver()
    second = cloud.adapt(demonstrations(24))
    cloud.learn(second)
    cloud.curator.tick()
    assert cloud.versions() == [1, 2, 3]
    assert set(second.evidence.learn) <= set(cloud.latest().manifest.learned_from)
    assert set(first.evidence.learn) <= set(cloud.latest().manifest.learned_from)


def test_a_device_that_committed_has_not_drifted_though_its_birth_is_late(cloud: Cloud) -> None:
    job = cloud.adapt(demonstrations(24))
    cloud.hear(demonstrations(24))  # people went on correcting the old student
    cloud.learn(job)
    cloud.curator.tick()
    for name in ("lamp-1", "lamp-2"):
        cloud.driver.connected("home", name, student=cloud.latest().student, release=2)
    cloud.driver.tick()
    assert cloud.driver.state("home").phase is Phase.DONE
    cloud.curator.tick()
    assert len(cloud.jobs.all()) == 1


def test_the_next_job_goes_on_from_the_last_and_asks_what_was_held_out(cloud: Cloud) -> None:
    first = cloud.adapt(demonstrations(24))
    cloud.learn(first)
    cloud.curator.tick()
    cloud.deliver()
    second = cloud.adapt(demonstrations(24))
    text = (second.folder / "spec.json").read_text()
    assert str(first.learnt) in text
    assert set(second.evidence.learn).isdisjoint(first.evidence.learn)
    from cloud.adapt import Spec

    spec = Spec.from_json(text)
    assert len(spec.earlier) == 8
    assert len(spec.replay) == 16
    assert spec.current.name == cloud.latest().student


def test_a_gate_that_refuses_is_shown_and_waits_for_more_evidence(cloud: Cloud) -> None:
    job = cloud.adapt(demonstrations(24))
    finish(job, "aa" * 32, "wrong", passed=False)
    for _ in range(3):
        cloud.curator.tick()
    assert cloud.versions() == [1]
    assert cloud.counted("refused") == 1
    assert len(cloud.jobs.all()) == 1
    cloud.hear(demonstrations(11))
    cloud.curator.tick()
    assert len(cloud.jobs.all()) == 1  # 35 of 36
    cloud.hear(demonstrations(1))
    cloud.curator.tick()
    assert cloud.jobs.all()[-1].name == "0002"


def test_a_job_without_a_result_runs_again_after_a_restart(cloud: Cloud) -> None:
    job = cloud.adapt(demonstrations(24))
    cloud.restart()
    cloud.curator.tick()
    assert cloud.jobs.started == [job.name]
    assert len(cloud.jobs.all()) == 1


def test_a_job_that_always_crashes_is_given_up(cloud: Cloud) -> None:
    cloud.adapt(demonstrations(24))
    for _ in range(6):
        cloud.jobs.end(1)
        cloud.curator.tick()
    assert cloud.jobs.started == ["0001"] * 3
    result = cloud.jobs.all()[-1].result
    assert result is not None
    assert "3 times" in result["error"]
    assert cloud.counted("failed") == 1


def test_a_job_that_a_full_disk_stopped_goes_on_later_and_is_never_given_up(cloud: Cloud) -> None:
    cloud.adapt(demonstrations(24))
    for number in range(2, 7):
        cloud.jobs.end(NO_ROOM)
        for _ in range(3):
            cloud.curator.tick()
        assert len(cloud.jobs.started) == number - 1
        cloud.now += 700
        cloud.curator.tick()
        assert cloud.jobs.started == ["0001"] * number
    assert cloud.jobs.all()[-1].result is None


SHORT = LearnerConfig.named("sft-anchored", steps=2, batch=8)
"""Takes eight demonstrations at once."""


def test_more_than_the_steps_can_learn_waits_for_the_next_job(cloud: Cloud) -> None:
    cloud.restart(learner=SHORT)
    given = demonstrations(60)
    first = cloud.adapt(given)
    assert (len(first.evidence.learn), len(first.evidence.held_out)) == (8, 9)
    assert len(first.evidence.waiting) == 43
    cloud.learn(first)
    cloud.curator.tick()
    taken = {*first.evidence.learn, *first.evidence.held_out}
    assert set(cloud.latest().manifest.learned_from) == taken
    cloud.deliver()
    cloud.curator.tick()  # although nobody has raised an alarm on the new student
    second = cloud.jobs.end()
    assert second.name == "0002"
    assert taken.isdisjoint((*second.evidence.learn, *second.evidence.held_out))
    assert {d.id for d in given} > {*second.evidence.learn, *second.evidence.held_out}


def test_a_refusal_counts_what_waited_too(cloud: Cloud) -> None:
    cloud.restart(learner=SHORT)
    finish(cloud.adapt(demonstrations(60)), "none", "wrong", passed=False)
    for _ in range(3):
        cloud.curator.tick()
    cloud.hear(demonstrations(29))
    cloud.curator.tick()
    assert len(cloud.jobs.all()) == 1  # 89 of 90
    cloud.hear(demonstrations(1))
    cloud.curator.tick()
    assert len(cloud.jobs.all()) == 2


def test_after_a_refusal_only_evidence_counts_that_is_still_looked_at(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a channel full of evidence could never grow enough to try again."""
    monkeypatch.setattr("cloud.curator._LOOKED_AT", 60)
    finish(cloud.adapt(demonstrations(60)), "none", "wrong", passed=False)
    cloud.curator.tick()
    cloud.hear(demonstrations(19))
    cloud.curator.tick()
    assert len(cloud.jobs.all()) == 1  # 60 of 1.5 times 41
    cloud.hear(demonstrations(1))
    cloud.curator.tick()
    assert len(cloud.jobs.all()) == 2


def test_what_was_too_long_is_neither_learnt_nor_replayed_nor_tried_again(cloud: Cloud) -> None:
    given = demonstrations(24)
    job = cloud.adapt(given)
    cloud.learn(job, left_out=[1])
    cloud.curator.tick()
    long = job.evidence.learn[1]
    assert long not in cloud.latest().manifest.learned_from
    cloud.deliver()
    more = cloud.adapt(demonstrations(20))
    assert long not in {*more.evidence.learn, *more.evidence.held_out, *more.evidence.waiting}
    replayed = {d.messages[0].content for d in spec_of(more).replay}
    assert len(replayed) == 15
    assert replayed.isdisjoint(d.messages[0].content for d in given if d.id == long)


def test_what_a_job_had_no_time_for_stays_on_devices_and_is_learnt_next(cloud: Cloud) -> None:
    given = demonstrations(24)
    job = cloud.adapt(given)
    cloud.learn(job, unseen=[0, 3])
    cloud.curator.tick()
    missed = {job.evidence.learn[i] for i in (0, 3)}
    assert set(cloud.latest().manifest.learned_from) == {d.id for d in given} - missed
    cloud.deliver()
    cloud.curator.tick()
    assert cloud.unlearned() == 2
    more = cloud.adapt(demonstrations(20))
    assert missed <= {*more.evidence.learn, *more.evidence.held_out}
    replayed = {d.messages[0].content for d in spec_of(more).replay}
    assert len(replayed) == 14
    assert replayed.isdisjoint(d.messages[0].content for d in given if d.id in missed)


def test_a_release_that_people_gave_up_is_not_made_again_of_the_same(cloud: Cloud) -> None:
    job = cloud.adapt(demonstrations(24))
    cloud.learn(job)
    cloud.curator.tick()
    cloud.driver.tick()
    cloud.driver.obey("home", Abort("people complain"))
    cloud.curator.tick()
    latest = cloud.latest()
    assert (latest.version, latest.student) == (3, digest(cloud.student))
    withdrawn = cloud.releases.find("home", 2)
    assert withdrawn is not None
    assert withdrawn.withdrawn
    assert not latest.manifest.learned_from
    cloud.curator.tick()
    assert cloud.driver.state("home").phase is Phase.DONE
    assert len(cloud.jobs.all()) == 1  # the devices are drifted as before
    cloud.hear(demonstrations(12))
    cloud.curator.tick()
    assert len(cloud.jobs.all()[-1].evidence.learn) == 28


def products(job: Job) -> None:
    """Such as a job's process writes beside its candidate."""
    left, right = np.ones((8, 1), np.int8), np.ones((64, 1), np.int8)
    factors = delta.Factors.of(left, right, np.ones(1), 0.01)
    tensor = delta.Tensor(0, 8, 64, 8 * 64, 64)
    delta.save_updates([delta.Update(tensor, 0, factors)], job.folder / "updates.npz")


@pytest.fixture
def sent(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products each release was published with."""
    seen: list[int] = []
    publish = cloud.releases.publish

    def watched(*given: Any, **options: Any) -> Release:  # noqa: ANN401 - handed on
        seen.append(len(options.get("updates", ())))
        return publish(*given, **options)

    monkeypatch.setattr(cloud.releases, "publish", watched)
    return seen


def test_products_of_a_job_go_into_its_release(cloud: Cloud, sent: list[int]) -> None:
    job = cloud.adapt(demonstrations(24))
    spec = spec_of(job)
    assert (spec.release, spec.delta_share) == (1, DELTA_SHARE)
    cloud.learn(job)
    products(job)
    cloud.curator.tick()
    assert (cloud.latest().version, sent) == (2, [1])


def test_products_that_a_crash_damaged_hold_up_no_release(cloud: Cloud, sent: list[int]) -> None:
    job = cloud.adapt(demonstrations(24))
    cloud.learn(job)
    (job.folder / "updates.npz").write_bytes(b"")
    cloud.curator.tick()
    assert (cloud.latest().version, sent) == (2, [0])


def test_products_for_a_release_that_is_not_the_newest_any_more_are_not_sent(
    cloud: Cloud, sent: list[int]
) -> None:
    job = cloud.adapt(demonstrations(24))
    cloud.releases.republish("home", 1)
    cloud.learn(job)
    products(job)
    cloud.curator.tick()
    assert (cloud.latest().version, sent) == (3, [0])


def test_after_a_rollback_all_codes_are_sent(cloud: Cloud) -> None:
    """What is in service is not what learning goes on from: nothing can be added to its codes."""
    first = digest(cloud.student)
    for changed in (1, 2):
        job = cloud.adapt(demonstrations(24))
        assert spec_of(job).delta_share == DELTA_SHARE
        cloud.learn(job, changed=changed)
        cloud.curator.tick()
        cloud.deliver()
    order = Bring(Content(1, first), gives_up=True, reason="rather the first")
    cloud.driver.obey("home", order)
    cloud.curator.tick()
    cloud.deliver()
    assert cloud.latest().student == first
    job = cloud.adapt(demonstrations(24))
    assert spec_of(job).learnt is not None
    assert spec_of(job).delta_share == 0


def spec_of(job: Job) -> Spec:
    return Spec.from_json((job.folder / "spec.json").read_text())


def test_a_person_may_go_back_to_any_release_whatever_dies_in_between(cloud: Cloud) -> None:
    job = cloud.adapt(demonstrations(24))
    cloud.learn(job)
    cloud.curator.tick()
    first = Content(1, digest(cloud.student))
    cloud.driver.obey("home", Bring(first, gives_up=True, reason="rather the first"))
    cloud.restart()  # ordered, and nothing published
    cloud.curator.tick()
    assert (cloud.latest().version, cloud.latest().student) == (3, first.student)
    assert cloud.driver.state("home").version == 3
    second = Content(2, cloud.releases.release("home", 2).student)
    cloud.driver.obey("home", Bring(second, gives_up=False, reason="again", plan=Plan(soak_s=9)))
    cloud.releases.republish("home", 2)
    cloud.restart()  # published, and not begun
    cloud.curator.begin()
    cloud.curator.tick()
    rollout = cloud.driver.state("home")
    assert (rollout.version, rollout.student, rollout.plan.soak_s) == (4, second.student, 9)
    assert rollout.wanted() is None


def test_a_release_that_people_correct_more_than_what_they_had_is_halted(cloud: Cloud) -> None:
    cloud.curator.begin()
    old = cloud.latest().student
    names = [f"lamp-{n}" for n in range(3)]
    guarding = Guarding(
        channel="home", evidence=cloud.evidence, driver=cloud.driver, clock=lambda: cloud.now
    )
    for name in names:
        cloud.driver.connected("home", name, student=old, release=1)
        fine = demonstrations(10, device=name, student=old, source=CONFIRMATION)
        cloud.evidence.add(fine)
    new = "ab" * 32
    cloud.now += 60
    plan = Plan(waves=("rest",), soak_s=86_400.0)
    cloud.driver.obey("home", Bring(Content(1, new), gives_up=False, reason="", plan=plan))
    cloud.driver.begin("home", 2, student=new)
    for sequence, name in enumerate(names, start=1):
        cloud.driver.report("home", Report(name, 2, Outcome.COMMITTED, new, sequence))
        guarding.tick()
    for name in names[:2]:
        cloud.evidence.add(demonstrations(3, device=name, student=new))
        guarding.tick()
    assert cloud.driver.state("home").phase is Phase.RUNNING, "six items are too few"
    cloud.evidence.add(demonstrations(2, device=names[2], student=new))
    guarding.tick()
    rollout = cloud.driver.state("home")
    assert rollout.phase is Phase.HALTED
    assert "8 of 8 judged answers were corrected, on 3 devices" in rollout.reason
    cloud.driver.obey("home", Resume())
    guarding.tick()
    assert cloud.driver.state("home").phase is Phase.RUNNING, "a person overruled it"


def test_what_is_tested_is_never_trained_on_whoever_says_it_again(cloud: Cloud) -> None:
    cloud.deliver()
    first = cloud.adapt(demonstrations(30))
    cloud.learn(first)
    cloud.curator.tick()
    cloud.deliver()
    held = {d.id: d for d in cloud.evidence.demonstrations("home")}
    old = [held[i].messages[0].content for i in first.evidence.held_out]
    said_again = [demonstration(text, "right", source=CONFIRMATION) for text in old]
    changed = demonstration(old[0], "left")
    cloud.hear([*said_again[1:], changed], alarm=False)
    second = Spec.from_json((cloud.adapt(demonstrations(30)).folder / "spec.json").read_text())
    trained = {d.messages for d in (*second.train, *second.replay)}
    asked = {d.messages: d.answer for d in (*second.held_out, *second.earlier)}
    assert not trained & asked.keys()
    assert {m[0].content for m in asked} >= set(old[1:])
    news = {d.messages[0].content: d.answer for d in (*second.train, *second.held_out)}
    assert news[old[0]] == "left"


def sign_offline(cloud: Cloud, key: Path) -> None:
    """What a person does with the folder and the key that is not on the cloud's machine."""
    ceremony.add_signature(cloud.folder / "tuf" / "to-sign", keys.load(key))
    cloud.releases.sync()


def test_a_release_that_waits_to_be_signed_is_rolled_out_when_it_was(
    cloud: Cloud, tmp_path: Path
) -> None:
    cloud.deliver()
    key = (cloud.folder / "keys" / "targets.pem").rename(tmp_path / "targets.pem")
    job = cloud.adapt(demonstrations(30))
    cloud.learn(job)
    cloud.curator.tick()
    assert cloud.latest().version == job.version == 2
    assert not cloud.latest().signed
    unsigned = cloud.registry.get_sample_value("anabranch_releases_unsigned", {"channel": "home"})
    assert unsigned == 1
    cloud.hear(demonstrations(30))
    for _ in range(2):
        cloud.curator.tick()
        assert cloud.driver.state("home").version == 1
        assert not cloud.jobs.running(), "nothing is learnt on top of what waits"
        cloud.restart()
    sign_offline(cloud, key)
    cloud.curator.tick()
    assert cloud.driver.state("home").version == 2
    cloud.deliver()


def test_a_rollback_needs_no_key_that_is_away(cloud: Cloud, tmp_path: Path) -> None:
    cloud.deliver()
    first = cloud.latest()
    cloud.learn(cloud.adapt(demonstrations(30)))
    cloud.curator.tick()
    for role in ("root", "targets"):
        (cloud.folder / "keys" / f"{role}.pem").rename(tmp_path / f"{role}.pem")
    cloud.driver.obey("home", Abort("people complain"))
    cloud.curator.tick()
    assert cloud.latest().signed
    assert (cloud.latest().version, cloud.latest().student) == (3, first.student)
    assert cloud.driver.state("home").version == 3


def test_a_rollback_that_waits_to_be_signed_is_made_once(cloud: Cloud, tmp_path: Path) -> None:
    """The release before was not known to be good when this one was signed."""
    first = cloud.latest()
    cloud.deliver()
    cloud.learn(cloud.adapt(demonstrations(30)))
    cloud.curator._fallback = lambda: 0  # type: ignore[method-assign] # as it was at that time
    cloud.curator.tick()
    key = (cloud.folder / "keys" / "targets.pem").rename(tmp_path / "targets.pem")
    cloud.driver.obey("home", Abort("people complain"))
    for _ in range(3):
        cloud.curator.tick()
        assert (cloud.latest().version, cloud.latest().signed) == (3, False)
        assert cloud.driver.state("home").version == 2
    sign_offline(cloud, key)
    cloud.curator.tick()
    assert cloud.driver.state("home").version == 3
    assert cloud.latest().student == first.student
