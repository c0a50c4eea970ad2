"""An agent as a process of its own, with students in memory in place of ONNX Runtime.

Run as a script: ``agent_process.py '{"state": ..., "device": ..., ...}'``, the options as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.agent import AgentConfig, run
from edge.student.bundle import digest, read_harness
from edge.student.runtime import Answer
from protos.errors import AnabranchError, IntegrityError
from protos.harness import Harness

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.student.runtime import Decoding
    from protos.prompt import Message
    from tests.agent.scripted_student import ScriptedStudent, echo
else:
    from scripted_student import ScriptedStudent, echo

FIRST = "this is the first student"


def make_bundle(folder: Path, reply: str) -> str:
    """A bundle whose student says ``reply``; where that is empty, it repeats a demonstration."""
    folder.mkdir(parents=True)
    (folder / "graph.onnx").write_bytes(b"graph")
    (folder / "weights.bin").write_text(reply)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "student.json").write_text("{}")
    (folder / "harness.json").write_bytes(Harness(system=f"You say {reply!r}.").to_json())
    return digest(folder)


class BundleStudent(ScriptedStudent):
    """Says what is in its weights."""

    def answer(self, messages: Sequence[Message], decoding: Decoding) -> Answer:
        run = self.begin(messages, decoding)
        text = ""
        while not run.done:
            text += "".join(t.text for t in run.advance())
        run.close()
        return Answer(text, 0.1, "stop", 1, 1)


def open_student(folder: Path) -> BundleStudent:
    text = (folder / "weights.bin").read_text()
    if text == "broken":
        message = f"the student in {folder} cannot be opened"
        raise IntegrityError(message)
    return BundleStudent(
        digest=digest(folder),
        harness=read_harness(folder),
        reply=(lambda _: text) if text else echo,
        pause=lambda: time.sleep(0.002),
    )


def config(options: dict[str, Any]) -> AgentConfig:
    """Paths are texts in JSON."""
    paths = {k: Path(options[k]) for k in ("state", "student", "trust")}
    return AgentConfig(**{**options, **paths})


if __name__ == "__main__":
    try:
        run(config(json.loads(sys.argv[1])), open_student=open_student)
    except AnabranchError as error:
        sys.exit(f"{type(error).__name__}: {error}")
