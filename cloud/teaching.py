"""Skills taught by hand, one file of demonstrations after another, without a fleet.

A folder holds the jobs as a cloud's state does (:mod:`cloud.jobs`). Each goes on from the last one
whose candidate passed the gate, replays what was taught before, and is asked it again. What was not
finished goes on with the same call; what is finished is not done again.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cloud import jobs as job_rules
from cloud.adapt import Spec
from cloud.jobs import Evidence, Job, Jobs
from cloud.learners.config import LearnerConfig
from cloud.students.candidates import DELTA_SHARE
from protos.errors import InvalidInputError
from protos.prompt import Message, Shown, chat

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from cloud.gate.gate import GateConfig
    from cloud.students.importer import Imported

LEAST = 10
"""Demonstrations of a skill: fewer are too few to learn from and to test on."""
_EARLIER = 40  # asked again, of what was held out before
_FORMAT = (
    'a line is {"prompt": "...", "completion": "..."}, each a text or a list of messages, '
    'or {"messages": [...]} that end with the answer'
)


@dataclass(frozen=True)
class Demonstration:
    """A demonstration, by a name that its request decides."""

    id: str
    shown: Shown


@dataclass(frozen=True)
class How:
    """How a skill is taught; ``delta_share`` as in :class:`cloud.adapt.Spec`."""

    learner: LearnerConfig
    gate: GateConfig
    threads: int = 2
    delta_share: float = DELTA_SHARE


def read(path: Path) -> list[Demonstration]:
    """Demonstrations from a file of JSON lines, in TRL's formats of data sets.

    A line is ``{"prompt": ..., "completion": ...}``, each a text or a list of messages (``role``
    and ``content``), or ``{"messages": [...]}`` of which the last is the assistant's. Of lines with
    the same request the last one counts.

    Raises:
        InvalidInputError: a line is something else, or there are fewer than :data:`LEAST`.
    """
    found: dict[tuple[Message, ...], Demonstration] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read: {error}"
        raise InvalidInputError(msg) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            shown = _shown(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, InvalidInputError) as error:
            msg = f"{path}:{number}: {_why(error)}: {_FORMAT}"
            raise InvalidInputError(msg) from error
        found[shown.messages] = Demonstration(_id(shown.messages), shown)
    if len(found) < LEAST:
        msg = f"{path} has {len(found)} requests: a skill needs {LEAST} to be learnt and tested"
        raise InvalidInputError(msg)
    return list(found.values())


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, json.JSONDecodeError | InvalidInputError | UnicodeError):
        return str(error)
    return "it has another form"


def _shown(row: dict[str, Any]) -> Shown:
    if "messages" in row:
        *asked, last = _messages(row["messages"], "user")
    else:
        asked = _messages(row["prompt"], "user")
        (last,) = _messages(row["completion"], "assistant")
    chat("", asked)  # raises where there is nothing to answer
    if last.role != "assistant" or not last.content.strip():
        msg = "the answer must be the assistant's, and have words"
        raise InvalidInputError(msg)
    for message in (*asked, last):
        message.content.encode()  # raises for half a character
    return Shown(tuple(asked), last.content.strip())


def _messages(given: Any, role: str) -> list[Message]:  # noqa: ANN401  # whatever JSON held
    if isinstance(given, str):
        return [Message(role, given)]
    made = [Message(m["role"], m["content"]) for m in given]
    if not all(isinstance(m.content, str) for m in made):
        msg = "the content of a message must be a text"
        raise InvalidInputError(msg)
    return made


def _id(request: tuple[Message, ...]) -> str:
    text = json.dumps([[m.role, m.content] for m in request])
    return hashlib.sha256(text.encode()).hexdigest()


def with_steps(learner: LearnerConfig, demonstrations: int, steps: int | None) -> LearnerConfig:
    """A learner with so many steps; None: what is usual, or two draws of each demonstration."""
    enough = math.ceil(2 * demonstrations / learner.batch)
    return replace(learner, steps=steps or max(LearnerConfig().steps, enough))


def job_for(
    folder: Path, student: Imported, demonstrations: Sequence[Demonstration], how: How
) -> Job:
    """The job of ``folder`` that teaches these: the latest, done or not, if it does, or a new one.

    Raises:
        InvalidInputError: the latest job teaches something else and is not done, or the folder
            belongs to another student.
        StorageError: the disk is full or failed.
    """
    jobs = Jobs(folder)
    done = jobs.all()
    if done:
        latest = done[-1]
        as_it_began, _ = _spec(done[:-1], student, demonstrations, how)
        spec = _spec_of(latest)
        if spec.base != as_it_began.base:
            msg = f"{folder} teaches the student of {spec.base.parent}: give another --out"
            raise InvalidInputError(msg)
        if spec == as_it_began:
            return latest
        if latest.result is None:
            msg = (
                f"{latest.folder} is not done and teaches something else: "
                "go on with the command that began it, or delete that folder"
            )
            raise InvalidInputError(msg)
    return jobs.create(*_spec(done, student, demonstrations, how))


def _spec(
    before: Sequence[Job], student: Imported, demonstrations: Sequence[Demonstration], how: How
) -> tuple[Spec, Evidence]:
    passed = [job for job in before if (job.result or {}).get("passed")]
    last = passed[-1] if passed else None
    learn, held = job_rules.split(demonstrations, how.learner.most_lessons)
    new = {d.shown.messages for d in demonstrations}
    specs = [(_spec_of(job), job.result or {}) for job in passed]
    tested = _latest((d for spec, _ in specs for d in spec.held_out), new)
    replay = _latest(
        (d for spec, result in specs for d in job_rules.learnt(spec, result)),
        new | {d.shown.messages for d in tested},
    )
    taken = {d.id for d in (*learn, *held)}
    evidence = Evidence(
        tuple(d.id for d in learn),
        tuple(d.id for d in held),
        tuple(d.id for d in demonstrations if d.id not in taken),
    )
    spec = Spec(
        masters=student.masters.absolute(),
        learnt=last.learnt.absolute() if last else None,
        base=student.bundle.absolute(),
        current=(last.candidate if last else student.bundle).absolute(),
        train=tuple(d.shown for d in learn),
        held_out=tuple(d.shown for d in held),
        replay=tuple(d.shown for d in job_rules.sample(replay)),
        earlier=tuple(d.shown for d in job_rules.sample(tested, _EARLIER)),
        threads=how.threads,
        learner=how.learner,
        gate=replace(how.gate, threads=how.threads),
        release=len(passed),
        delta_share=how.delta_share,
    )
    return spec, evidence


def _latest(given: Iterable[Shown], without: set[tuple[Message, ...]]) -> list[Demonstration]:
    """One for each request, the latest; none whose request is taught or tested now."""
    kept = {d.messages: d for d in given if d.messages not in without}
    return [Demonstration(_id(request), shown) for request, shown in kept.items()]


def _spec_of(job: Job) -> Spec:
    return Spec.from_json((job.folder / "spec.json").read_text())
