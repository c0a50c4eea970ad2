"""Demonstrations, specs and results as jobs work with them."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.adapt import Spec
from cloud.learners.config import LearnerConfig
from protos.harness import Harness
from protos.prompt import Message, Shown
from protos.v1 import device_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cloud.jobs import Job

CORRECTION, CONFIRMATION = device_pb2.SOURCE_CORRECTION, device_pb2.SOURCE_CONFIRMATION
FIRST_MS = 1_700_000_000_000
_NUMBERS = count(1)


def demonstration(request: str, right: str, **fields: Any) -> device_pb2.Demonstration:  # noqa: ANN401
    """A correction by default; each is made a millisecond after the one before."""
    number = next(_NUMBERS)
    message = device_pb2.Demonstration(
        id=f"01900000-0000-7000-8000-{number:012x}",
        channel="home",
        device="lamp-1",
        student="d" * 64,
        created_ms=FIRST_MS + number,
        messages=[device_pb2.ChatMessage(role="user", content=request)],
        answer="no",
        correction=right,
        source=CORRECTION,
    )
    message.MergeFrom(device_pb2.Demonstration(**fields))
    return message


def demonstrations(number: int, **fields: Any) -> list[device_pb2.Demonstration]:  # noqa: ANN401
    """So many corrections of different requests."""
    return [demonstration(f"request {next(_NUMBERS)}", "right", **fields) for _ in range(number)]


def drift(**fields: Any) -> device_pb2.DriftReport:  # noqa: ANN401
    """An alarm of ``lamp-1`` before all demonstrations."""
    message = device_pb2.DriftReport(
        id=f"01900000-0000-7000-8000-{next(_NUMBERS):012x}",
        channel="home",
        device="lamp-1",
        student="d" * 64,
        created_ms=FIRST_MS,
        kind=device_pb2.DRIFT_KIND_CONCEPT,
    )
    message.MergeFrom(device_pb2.DriftReport(**fields))
    return message


def shown(request: str, answer: str = "right") -> Shown:
    return Shown((Message("user", request),), answer)


def spec(**fields: Any) -> Spec:  # noqa: ANN401
    """A spec whose paths lead nowhere."""
    given: dict[str, Any] = {
        "masters": Path("/masters"),
        "learnt": None,
        "base": Path("/base"),
        "current": Path("/current"),
        "train": tuple(shown(f"learn {i}") for i in range(3)),
        "held_out": (shown("hold 0"), shown("hold 1")),
        "replay": (),
        "earlier": (),
        "threads": 1,
        "learner": LearnerConfig(steps=2, batch=2),
    }
    return Spec(**given | fields)


def finish(
    job: Job,
    student: str,
    answer: str,
    *,
    passed: bool = True,
    left_out: Sequence[int] = (),
    unseen: Sequence[int] = (),
) -> None:
    """Write what the process of a job writes at its end; its student gives one answer to all."""
    whole = Spec.from_json((job.folder / "spec.json").read_text())
    result = {
        "passed": passed,
        "checks": [{"name": "new", "value": 1.0, "bound": 0.5, "passed": passed}],
        "student": student,
        "changed_codes": 1,
        "sdft_seconds": 1.0,
        "peak_mb": 700.0,
        "teacher": {"gain": 1.5},
        "left_out": list(left_out),
        "unseen": list(unseen),
        "canaries": [
            {"messages": [asdict(m) for m in d.messages], "answer": answer}
            for d in (*whole.held_out, *whole.earlier)
        ],
    }
    (job.folder / "result.json").write_text(json.dumps(result))


def write_bundle(folder: Path, *, changed: int = 0) -> Path:
    """A bundle that no runtime could open: so many of its codes differ from the first's."""
    folder.mkdir(parents=True)
    codes = bytearray(bytes(range(256)) * 64)
    for i in range(changed):
        codes[i] ^= 1
    (folder / "weights.bin").write_bytes(codes)
    (folder / "graph.onnx").write_bytes(b"graph")
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "student.json").write_bytes(b"{}")
    (folder / "harness.json").write_bytes(Harness().to_json())
    return folder
