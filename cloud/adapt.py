"""One adaptation as a process of its own: evidence in, a judged candidate out.

``python -m cloud.adapt JOB`` reads ``JOB/spec.json`` and writes ``JOB/progress.json`` as it goes
and ``JOB/result.json`` at the end. A process of its own keeps the service answering while two
cores learn, gives its memory back, and may be killed at any time: run again, it goes on from its
last checkpoint and comes to the same result.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import resource
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save

from cloud import anchors
from cloud.encoder import Encoder
from cloud.gate import gate
from cloud.learners import prompts
from cloud.learners.checkpoint import remove_checkpoints
from cloud.learners.config import LearnerConfig
from cloud.learners.course import Control, Course, Outcome, StepReport
from cloud.learners.learner import learn as learn_course
from cloud.learners.model import SplitModel
from cloud.learners.precision import narrow
from cloud.progress import Progress
from cloud.students.candidates import (
    DELTA_SHARE,
    Candidate,
    Work,
    candidates,
    remove_leftovers,
)
from edge.delta import save_updates
from edge.delta.files import write_atomic
from edge.process import PARENT, end_with_parent
from edge.student.bundle import digest, read_config, read_harness
from protos.errors import AnabranchError, TrainingError
from protos.prompt import Message, Shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from cloud.learners.packing import Example

log = logging.getLogger("anabranch.adapt")

CANDIDATE, LEARNT, UPDATES = "candidate", "learnt.safetensors", "updates.npz"
_LONGEST = 1024  # tokens of a demonstration, for SDFT as its teacher sees it: a row is as long
NO_ROOM = os.EX_IOERR
"""Exit code of a job that the disk stopped: it has no result, and goes on when it is run again."""


@dataclass(frozen=True)
class Spec:
    """What a job works on; paths are absolute, demonstrations carry their own text.

    ``masters`` is the imported fp32 model, ``learnt`` the parameters that earlier releases changed
    (None before the first). ``base`` is the bundle first imported, ``current`` the one in service.
    ``release`` is the number of that one; ``delta_share`` the most that an update by products may
    take, of the bytes of the weights.
    """

    masters: Path
    learnt: Path | None
    base: Path
    current: Path
    train: tuple[Shown, ...]
    held_out: tuple[Shown, ...]
    replay: tuple[Shown, ...]
    earlier: tuple[Shown, ...]
    threads: int = 2
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    gate: gate.GateConfig = field(default_factory=gate.GateConfig)
    release: int = 0
    delta_share: float = DELTA_SHARE

    def to_json(self) -> str:
        """``spec.json``."""
        return json.dumps(asdict(self), default=str, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Parse ``spec.json``."""
        raw: dict[str, Any] = json.loads(text)
        for name in ("masters", "base", "current"):
            raw[name] = Path(raw[name])
        raw["learnt"] = Path(raw["learnt"]) if raw["learnt"] else None
        for name in ("train", "held_out", "replay", "earlier"):
            raw[name] = tuple(_shown(r) for r in raw[name])
        raw["learner"] = LearnerConfig.from_json(raw["learner"])
        raw["gate"] = gate.GateConfig(**raw["gate"])
        raw.pop("split_share", None)  # of specs before learners had `layers`
        return cls(**raw)


def _shown(raw: dict[str, Any]) -> Shown:
    return Shown(tuple(Message(**m) for m in raw["messages"]), raw["answer"])


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old or the new, never a part.

    Raises:
        StorageError: the disk is full or failed.
    """
    write_atomic(path, text.encode())


def write_failure(job: Path, why: str) -> None:
    """Write ``result.json`` of a job that came to no candidate; nothing goes on from it.

    Raises:
        StorageError: the disk is full or failed.
    """
    remove_checkpoints(job)  # first: the disk may be full
    remove_leftovers(job / CANDIDATE)
    write_atomically(job / "result.json", json.dumps({"passed": False, "error": why}))


def run(job: Path, *, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """Do the job in the folder ``job``; returns what ``result.json`` holds.

    Raises:
        TrainingError: no demonstrations, or the training diverged.
        StorageError: the disk is full; run again when it is not, the job goes on.
        AnabranchError: anything else that the operator can act on.
    """
    whole = Spec.from_json((job / "spec.json").read_text())
    spec = fitting(whole)
    fit = set(spec.train)
    left_out = [i for i, d in enumerate(whole.train) if d not in fit]
    if left_out:
        log.warning("%d demonstrations are too long to learn from: left out", len(left_out))
    if not spec.train or not spec.held_out:
        msg = f"{len(spec.train)} demonstrations to learn, {len(spec.held_out)} held out: need both"
        if longer := len(whole.train) + len(whole.held_out) - len(spec.train) - len(spec.held_out):
            msg += f" ({longer} more are too long)"
        raise TrainingError(msg)
    general = anchors.said(spec.masters)  # read first: it must not fail after an hour of learning
    torch.set_num_threads(spec.threads)
    progress = Progress(job / "progress.json", clock)
    control = Control(clock, _report(progress), _phase(progress), job, memory=job.parent)
    outcome = learn(spec, control)
    candidate, verdict = _judged(spec, outcome.parameters, general, job, progress)
    unseen = {d for i, d in enumerate(spec.train) if i not in outcome.seen}
    if unseen:
        log.warning("%d demonstrations were not learnt from: they wait", len(unseen))
    said = dict(zip((*spec.held_out, *spec.earlier), verdict.answers, strict=True))
    result = {
        "passed": verdict.passed,
        "checks": verdict.to_json(),
        "student": digest(job / CANDIDATE),
        "update": candidate.way,
        "delta_bytes": candidate.delta_bytes,
        "noise": round(candidate.noise, 3),
        "changed_codes": candidate.changed,
        "method": outcome.method,
        "precision": outcome.precision,
        "steps": outcome.steps,
        "stopped": outcome.stopped,
        "teacher": None if outcome.worth is None else asdict(outcome.worth),
        "sdft_seconds": round(outcome.scoring_seconds + sum(outcome.step_seconds), 2),
        "scoring_seconds": round(outcome.scoring_seconds, 2),
        "step_seconds": round(statistics.median(outcome.step_seconds or [0.0]), 3),
        "peak_mb": peak_mb(),
        "left_out": left_out,
        "unseen": [i for i, d in enumerate(whole.train) if d in unseen],
        "canaries": [
            {"messages": [asdict(m) for m in d.messages], "answer": said.get(d, "")}
            for d in (*whole.held_out, *whole.earlier)
        ],
    }
    write_atomically(job / "result.json", json.dumps(result, indent=1))
    remove_checkpoints(job)
    progress("done", 1.0)
    return result


def _judged(
    spec: Spec,
    learnt: dict[str, torch.Tensor],
    said: dict[str, str],
    job: Path,
    progress: Progress,
) -> tuple[Candidate, gate.Verdict]:
    """Write the smallest candidate that passes the gate, or the last one, and what it holds."""
    work = Work(
        masters=spec.masters,
        before=load_file(spec.learnt) if spec.learnt else {},
        learnt=learnt,
        base=spec.base,
        current=spec.current,
        release=spec.release,
    )
    bundle = job / CANDIDATE
    progress("write the student", 0.8)
    for candidate in candidates(work, bundle, share=spec.delta_share):
        verdict = gate.run(
            gate.GateInput(
                base=spec.base,
                current=spec.current,
                candidate=bundle,
                new=spec.held_out,
                earlier=spec.earlier,
                general=tuple((p, said[p]) for p in prompts.GATE),
            ),
            spec.gate,
            lambda phase, part: progress(phase, 0.82 + 0.18 * part),
        )
        if verdict.passed:
            break
        log.info("the gate refuses the update by %s: %s", candidate.way, verdict.to_json())
    write_atomic(job / LEARNT, save(candidate.parameters))
    if candidate.updates:
        save_updates(candidate.updates, job / UPDATES)
    else:
        (job / UPDATES).unlink(missing_ok=True)  # of a run that was killed
    return candidate, verdict


def fitting(spec: Spec) -> Spec:
    """The spec without demonstrations too long to be learnt, or to be asked in the gate.

    A device may send 64 KiB; one such demonstration must not keep a channel from ever adapting.
    """
    harness, context = read_harness(spec.current), read_config(spec.current)["context_length"]
    encoder = Encoder.of(spec.current)

    def fits(demonstration: Shown, *, taught: bool = False) -> bool:
        lesson = encoder.lesson(demonstration, spec.learner)
        answer = max(harness.max_tokens, len(lesson.student.answer))
        asked = len(lesson.student.prefix) + len(lesson.student.prompt)
        seen = lesson.teacher if taught else lesson.student
        return asked + answer <= context and len(seen.tail) <= _LONGEST

    learnt = partial(fits, taught=spec.learner.method == "sdft")
    return replace(
        spec,
        train=tuple(filter(learnt, spec.train)),
        held_out=tuple(filter(learnt, spec.held_out)),
        replay=tuple(filter(fits, spec.replay)),
        earlier=tuple(filter(fits, spec.earlier)),
    )


def peak_mb() -> float:
    """The most memory that this process had so far, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def _phase(progress: Progress) -> Callable[[str, float], None]:
    return lambda name, part: progress(name, 0.02 + 0.18 * part)


def _report(progress: Progress) -> Callable[[StepReport], None]:
    def report(seen: StepReport) -> None:
        progress(
            f"learn, step {seen.step}", 0.2 + 0.6 * seen.fraction, loss=seen.loss, cut=seen.cut
        )

    return report


def learn(spec: Spec, control: Control) -> Outcome:
    """Train on a spec's demonstrations; all parameters that differ from the imported model."""
    control.phase("load the masters", 0.0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    learnt = load_file(spec.learnt) if spec.learnt else {}
    model = open_model(spec, learnt, device)
    outcome = learn_course(
        model,
        course(spec),
        spec.learner,
        control,
        end=read_config(spec.current)["eos"][0],
        learnt=learnt,
    )
    new = {name: value.cpu().contiguous() for name, value in outcome.parameters.items()}
    return replace(outcome, parameters=learnt | new)


def open_model(
    spec: Spec, learnt: Collection[str] = (), device: torch.device | None = None
) -> SplitModel:
    """The imported model, cut where the learner's layers begin.

    What was ``learnt`` below them is not cut off: weights of the release before go there.
    """
    from transformers import LlamaForCausalLM  # noqa: PLC0415  # seconds that the service saves

    model = LlamaForCausalLM.from_pretrained(
        spec.masters, dtype=torch.float32, local_files_only=True
    )
    device = device or torch.device("cpu")
    layers, (first, last) = model.config.num_hidden_layers, spec.learner.layers
    before = [int(n.split(".")[2]) for n in learnt if n.startswith("model.layers.")]
    begin = round(layers * first)
    held = any("embed_tokens" in n or "lm_head" in n for n in learnt)
    return SplitModel(
        model,
        split=0 if held else min([begin, *before]),
        begin=begin,
        end=round(layers * last),
        embeddings=spec.learner.embeddings,
        held_embeddings=held,
        device=device,
        bf16=narrow(spec.learner.precision, device),
    )


def course(spec: Spec) -> Course:
    """A spec's demonstrations in tokens, with the anchors."""
    encoder = Encoder.of(spec.current)
    return Course(
        lessons=tuple(encoder.lesson(d, spec.learner) for d in spec.train),
        held_out=tuple(encoder.lesson(d, spec.learner) for d in spec.held_out),
        replay=tuple(encoder.example(d.messages, d.answer) for d in spec.replay),
        anchors=_anchors(spec),
    )


def _anchors(spec: Spec) -> tuple[Example, ...]:
    if not (spec.learner.anchor_batch or spec.learner.ewc):
        return ()
    tokens = spec.learner.anchor_tokens
    return tuple(anchors.examples(spec.masters, spec.base, spec.current, tokens))


def main() -> int:
    """Entry point of the process.

    The exit code is 0 when there is a candidate and its verdict, 1 when a failure was written,
    and :data:`NO_ROOM` without a result.
    """
    if PARENT in os.environ:  # who began it ends it: a terminal's Ctrl-C goes to both
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    job = Path(sys.argv[1])
    try:
        result = run(job)
    except Exception as error:
        if _full(error):
            log.error("the job stopped: %s", error)  # noqa: TRY400  # the message is for people
            return NO_ROOM
        if isinstance(error, AnabranchError):
            log.error("the job failed: %s", error)  # noqa: TRY400  # as above
            why = str(error)
        else:
            # A fault of ours or of the machine: said once, the same input fails the same way.
            log.exception("the job failed")
            why = f"{type(error).__name__}: {error}; log.txt says where"
        write_failure(job, why)
        return 1
    log.info("gate %s: %s", "passed" if result["passed"] else "failed", result["checks"])
    return 0


def _full(error: BaseException | None) -> bool:
    """Whether the disk is full, or a quota is used up, and nothing else is wrong with it."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    return error is not None and _full(error.__cause__)


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)  # where the log cannot be written, an orderly exit would have another code
