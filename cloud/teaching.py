"""Skills taught by hand, one file of demonstrations after another, without a fleet.

A folder holds the jobs as a cloud's state does (:mod:`cloud.jobs`), and ``teaching.json``, which
says whose student it teaches. Each job goes on from the last one whose candidate passed the gate,
replays what was taught before, and is asked it again. What was not finished goes on with the same
call; what is taught is not taught again.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cloud.adapt import Spec, write_atomically
from cloud.jobs import Job, Jobs, learnt
from cloud.lessons import divide
from cloud.students.candidates import DELTA_SHARE
from protos.errors import InvalidInputError
from protos.prompt import Message, Shown, chat

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloud.encoder import Encoder
    from cloud.gate.gate import GateConfig
    from cloud.learners.config import LearnerConfig
    from cloud.lessons import Evidence
    from cloud.students.importer import Imported
    from protos.harness import Harness

LEAST = 20
"""Requests of a skill: with fewer, hardly any are left to learn from beside those held out."""
_MARK = "teaching.json"
_FORMAT = (
    'a line is {"prompt": "...", "completion": "..."}, each a text or a list of messages, '
    'or {"messages": [...]} that end with the answer'
)


@dataclass(frozen=True)
class Demonstration:
    """A demonstration, by a name that its text decides."""

    id: str
    shown: Shown

    @classmethod
    def of(cls, shown: Shown) -> Demonstration:
        """Name it."""
        text = json.dumps([[[m.role, m.content] for m in shown.messages], shown.answer])
        return cls(hashlib.sha256(text.encode()).hexdigest(), shown)


@dataclass(frozen=True)
class How:
    """How a skill is taught; ``delta_share`` as in :class:`cloud.adapt.Spec`."""

    learner: LearnerConfig
    gate: GateConfig
    threads: int = 2
    delta_share: float = DELTA_SHARE


def read(path: Path, system: str = "") -> list[Demonstration]:
    """Demonstrations from a file of JSON lines, in TRL's formats of data sets.

    A line is ``{"prompt": ..., "completion": ...}``, each a text or a list of messages (``role``
    and ``content``), or ``{"messages": [...]}`` of which the last is the assistant's. Of lines with
    the same request the last one counts. A system message that says what ``system`` does (the
    harness's) is left out, and so is white space around a message.

    Raises:
        InvalidInputError: a line is something else, or there are fewer than :data:`LEAST`.
    """
    found: dict[tuple[Message, ...], Demonstration] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path} cannot be read: {error}"
        raise InvalidInputError(msg) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            shown = _shown(json.loads(line), system)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            msg = f"{path}:{number}: {_why(error)}: {_FORMAT}"
            raise InvalidInputError(msg) from error
        except InvalidInputError as error:
            msg = f"{path}:{number}: {error}: {_FORMAT}"
            raise InvalidInputError(msg) from error
        found[shown.messages] = Demonstration.of(shown)
    if len(found) < LEAST:
        msg = f"{path} has {len(found)} requests: a skill needs {LEAST} to be learnt and tested"
        raise InvalidInputError(msg)
    return list(found.values())


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, json.JSONDecodeError | UnicodeError):
        return str(error)
    return "it has another form"


def _shown(row: dict[str, Any], system: str) -> Shown:
    if "messages" in row:
        *asked, last = _messages(row["messages"], "user")
    else:
        asked = _messages(row["prompt"], "user")
        (last,) = _messages(row["completion"], "assistant")
    asked = [m for m in asked if m != Message("system", system.strip())]
    chat("", asked)  # raises where there is nothing to answer
    if last.role != "assistant":
        msg = "the answer must be the assistant's"
        raise InvalidInputError(msg)
    for message in (*asked, last):
        if not message.content:
            msg = "a message has no words"
            raise InvalidInputError(msg)
        message.content.encode()  # raises for half a character
    return Shown(tuple(asked), last.content)


def _messages(given: Any, role: str) -> list[Message]:  # noqa: ANN401  # whatever JSON held
    if isinstance(given, str):
        return [Message(role, given.strip())]
    return [Message(m["role"], m["content"].strip()) for m in given]


def doubts(
    demonstrations: Sequence[Demonstration], harness: Harness, encoder: Encoder
) -> list[str]:
    """What a student cannot say as its harness has it: a sentence for each kind."""
    given = [d.shown for d in demonstrations]
    broken = [d.answer for d in given if harness.breaks_schema(d.answer)]
    tokens = [len(encoder.example(d.messages, d.answer).answer) - 1 for d in given]  # less its end
    long = [n for n in tokens if n > harness.max_tokens]
    found = []
    if broken:
        found.append(
            f"answers that break the harness's schema: {len(broken)}, such as {broken[0]!r}"
        )
    if long:
        found.append(
            f"answers of more than the harness's max_tokens ({harness.max_tokens}): {len(long)}, "
            f"the longest of {max(long)}; the student will break them off"
        )
    return found


def with_enough_steps(learner: LearnerConfig, demonstrations: int) -> LearnerConfig:
    """A learner that draws each demonstration twice, if it does not already."""
    return replace(learner, steps=max(learner.steps, math.ceil(2 * demonstrations / learner.batch)))


def open_folder(folder: Path, student: Imported) -> None:
    """Make a folder to teach a student in, or see that it is one.

    Raises:
        InvalidInputError: it holds something else, or teaches another student.
        StorageError: the disk is full or failed.
    """
    mark = folder / _MARK
    if not mark.exists():
        if {p.name for p in folder.iterdir()} - {"lock"}:
            msg = f"{folder} holds something else: give --out a folder that is new or empty"
            raise InvalidInputError(msg)
        write_atomically(mark, json.dumps({"version": 1, "student": student.digest}))
    try:
        of = json.loads(mark.read_text())["student"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{mark} is damaged: begin anew with another --out"
        raise InvalidInputError(msg) from error
    if of != student.digest:
        msg = (
            f"{folder} teaches another student ({of[:12]}, and this is {student.digest[:12]}): "
            "give another --out"
        )
        raise InvalidInputError(msg)


def job_for(
    folder: Path, student: Imported, demonstrations: Sequence[Demonstration], how: How
) -> Job:
    """The job of ``folder`` that teaches these: one that passed or is not done, or a new one.

    A job that failed is tried again; with other options it is left, as one whose candidate the gate
    refused, and a new one begins. :func:`open_folder` comes first.

    Raises:
        InvalidInputError: a job teaches something else and is not done, or these were taught with
            other options.
        StorageError: the disk is full or failed.
    """
    jobs = Jobs(folder)
    there = jobs.all()
    ids = {d.id for d in demonstrations}
    unchanged = True  # by later jobs
    for job in reversed(there):
        result, spec = job.result, spec_of(job)
        evidence = job.evidence
        same = {*evidence.learn, *evidence.held_out, *evidence.waiting} == ids
        if result is None:
            if same and job is there[-1]:
                return job
            msg = (
                f"{job.folder} teaches something else and is not done: go on with the file "
                "that it began with, or delete that folder"
            )
            raise InvalidInputError(msg)
        alike = (spec.learner, spec.gate.new_share, spec.gate.base_kl, spec.delta_share) == (
            *(how.learner, how.gate.new_share, how.gate.base_kl, how.delta_share),
        )
        if "error" in result:
            if same and alike and job is there[-1]:
                (job.folder / "result.json").unlink()
                return job
            continue
        if same and unchanged and result["passed"]:
            if alike:
                return job
            msg = (
                f"{job.folder} has taught these, with other options: to compare, give another --out"
            )
            raise InvalidInputError(msg)
        if same and alike and job is there[-1]:
            return job
        if result["passed"]:
            asked = {d.messages for d in (*spec.train, *spec.held_out)}
            unchanged &= asked.isdisjoint(d.shown.messages for d in demonstrations)
    return jobs.create(*_spec(there, student, demonstrations, how))


def _spec(
    before: Sequence[Job], student: Imported, demonstrations: Sequence[Demonstration], how: How
) -> tuple[Spec, Evidence]:
    passed = [job for job in before if (job.result or {}).get("passed")]
    last = passed[-1] if passed else None
    settled: list[tuple[Demonstration, bool]] = []
    for job in passed:
        spec = spec_of(job)
        settled += [(Demonstration.of(d), False) for d in learnt(spec, job.result or {})]
        settled += [(Demonstration.of(d), True) for d in spec.held_out]
    found = divide(demonstrations, settled, lambda d: d.shown, how.learner.most_lessons)
    if not found.held_out or not found.learn:
        msg = "all of these were taught before: add requests that were not, to test on"
        raise InvalidInputError(msg)
    spec = Spec(
        masters=student.masters.resolve(),
        learnt=last.learnt.resolve() if last else None,
        base=student.bundle.resolve(),
        current=(last.candidate if last else student.bundle).resolve(),
        train=tuple(d.shown for d in found.learn),
        held_out=tuple(d.shown for d in found.held_out),
        replay=tuple(d.shown for d in found.replay),
        earlier=tuple(d.shown for d in found.earlier),
        threads=how.threads,
        learner=how.learner,
        gate=replace(how.gate, threads=how.threads),
        release=len(passed),
        delta_share=how.delta_share,
    )
    return spec, found.evidence


def spec_of(job: Job) -> Spec:
    """What a job works on.

    Raises:
        InvalidInputError: another version of this project made it.
    """
    try:
        return Spec.from_json((job.folder / "spec.json").read_text())
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{job.folder} was made by another version: begin anew with another --out"
        raise InvalidInputError(msg) from error
