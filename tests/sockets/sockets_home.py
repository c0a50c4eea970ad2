"""A home: a cloud's process, a device's process, a bad line between them, and people who ask."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import httpx
import numpy as np

from edge.delta.files import TEMPORARY
from edge.delta.layout import tensors_in
from edge.process import PARENT
from edge.student.bundle import FILES, list_files, read_config
from edge.student.runtime import Student, greedy
from protos.prompt import Message, chat

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from tests.sockets.sockets_proxy import Proxy
else:
    from sockets_proxy import Proxy

Json = dict[str, Any]
PROMPT = "lamp on"
_DEADLINE_S = 120
_LULL_S = 0.05


def other_student(bundle: Path, folder: Path, seed: int) -> Path:
    """A student of the same build whose every code is another: no delta makes it smaller."""
    folder.mkdir()
    for name in FILES:
        shutil.copy(bundle / name, folder / name)
    weights = np.fromfile(folder / "weights.bin", np.uint8)
    rng = np.random.default_rng(seed)
    for tensor in tensors_in(read_config(folder)):
        end = tensor.offset + tensor.rows * tensor.columns
        weights[tensor.offset : end] = rng.permutation(weights[tensor.offset : end])
    weights.tofile(folder / "weights.bin")
    return folder


def answer_of(bundle: Path) -> str:
    """What a student answers to :data:`PROMPT`."""
    student = Student.open(bundle, threads=1)
    prompt = chat(student.harness.system, [Message("user", PROMPT)])
    answer = student.answer(prompt, greedy(student.harness)).text
    student.close()
    return answer


class Home:
    """One device with a bad line to its cloud; leaving the context kills both.

    Args:
        folder: state and logs.
        student: the bundle of the device's first student.
    """

    def __init__(self, folder: Path, student: Path) -> None:
        self.failures: list[str] = []
        """Requests of people that were not answered."""
        self.answered = 0
        self._folder = folder
        self._student = student
        self._state = folder / "device"
        self._seed = 0
        self._others: list[Path] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._away = threading.Event()
        self._left = threading.Event()
        self._people = threading.Thread(target=self._ask, name="people")

    def __enter__(self) -> Self:
        try:
            self._cloud = self._launch("cloud", "sockets_cloud.py", str(self._folder / "cloud"))
            hello = self._hear()
            self._trust = str(hello["trust"])
            self.proxy = Proxy(int(hello["port"])).__enter__()
            self.start()
            self._people.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._left.set()
        if self._people.is_alive():
            self._people.join()
        for process in self._processes:
            process.kill()
            process.wait()

    def start(self) -> None:
        """Start the device's process, and wait until it serves."""
        (self._state / "agent.json").unlink(missing_ok=True)
        command = ["edge", "--state", str(self._state), "--device", "kitchen", "--threads", "1"]
        command += ["--student", str(self._student), "--trust", self._trust]
        command += ["--broker", "127.0.0.1:1", "--cloud", f"127.0.0.1:{self.proxy.port}"]
        command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]
        self._device = self._launch("device", "sockets_agent.py", *command)
        self.until((self._state / "agent.json").exists)
        self._away.clear()

    def kill(self) -> None:
        """SIGKILL to the device; people do not ask it until it was started again."""
        self._away.set()
        self._device.kill()
        self._device.wait()
        self._processes.remove(self._device)

    def release(self) -> Json:
        """Publish a student that the device does not have: version, student, bytes to fetch."""
        self._seed += 1
        folder = self._folder / f"student-{self._seed}"
        bundle = other_student(self._student, folder, self._seed)
        order = {
            "bundle": str(bundle),
            "prompt": PROMPT,
            "answer": answer_of(bundle),
            "provisioned": [f.sha256 for f in list_files(self._student)],
        }
        assert self._cloud.stdin is not None
        self._cloud.stdin.write(json.dumps(order) + "\n")
        self._cloud.stdin.flush()
        return self._hear()

    def serves(self, release: Json) -> bool:
        """Whether people are answered by a release's student."""
        health = self.health()
        if health.get("update", {}).get("state") == "failed":
            message = f"the update failed: {health['update']}"
            raise AssertionError(message)
        return (health.get("release"), health.get("student")) == (
            release["version"],
            release["student"],
        )

    def health(self) -> Json:
        """What the device says of itself; nothing while it is away."""
        with suppress(OSError, httpx.HTTPError, ValueError):
            body: Json = httpx.get(f"{self._note()['api']}/healthz", timeout=20).json()
            return body
        return {}

    def fetched(self) -> int:
        """Bytes that the device's process has fetched, those thrown away included."""
        lines = httpx.get(self._note()["metrics"], timeout=20).text.splitlines()
        name = "anabranch_update_fetched_bytes_total{"
        return int(sum(float(line.split()[-1]) for line in lines if line.startswith(name)))

    def part(self) -> int:
        """Bytes of the download that is under way, on the device's disk."""
        parts = (self._state / "downloads").glob("*.part")
        return sum(p.stat().st_size for p in parts)

    def let_files_have(self, size: int = resource.RLIM_INFINITY) -> None:
        """Let no file of the device's process become longer, as on a disk that is full."""
        resource.prlimit(self._device.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def logged(self, text: str) -> bool:
        """Whether the device has said something."""
        return text in (self._folder / "device.log").read_text()

    def left_over(self) -> list[str]:
        """What an update must not leave on the device's disk."""
        files = [p for p in self._state.rglob("*") if p.name.endswith((".part", TEMPORARY))]
        slots = [p for p in (self._state / "slots").iterdir() if p.is_dir()]
        return [str(p) for p in files] + [str(p) for p in slots[2:]]

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds, while both processes run."""
        end = time.monotonic() + _DEADLINE_S
        while not condition():
            for process in self._processes:
                assert process.poll() is None, self._log()
            assert time.monotonic() < end, (self.health(), self._log())
            time.sleep(0.02)

    def _note(self) -> Json:
        note: Json = json.loads((self._state / "agent.json").read_text())
        return note

    def _launch(self, name: str, script: str, *arguments: str) -> subprocess.Popen[str]:
        with (self._folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name(script)), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {PARENT: str(os.getpid())},
            )
        self._processes.append(process)
        return process

    def _hear(self) -> Json:
        said: IO[str] | None = self._cloud.stdout
        assert said is not None
        line = said.readline()
        assert line, self._log()
        heard: Json = json.loads(line)
        return heard

    def _log(self) -> str:
        logs = [p.read_text()[-2000:] for p in sorted(self._folder.glob("*.log"))]
        return "\n".join(logs)

    def _ask(self) -> None:
        body = {"messages": [{"role": "user", "content": PROMPT}]}
        with httpx.Client(timeout=30) as people:
            while not self._left.wait(_LULL_S):
                if self._away.is_set():
                    continue
                try:
                    url = f"{self._note()['api']}/v1/chat/completions"
                    people.post(url, json=body).raise_for_status()
                    self.answered += 1
                except (OSError, httpx.HTTPError, ValueError) as error:
                    if not self._away.is_set():
                        self.failures.append(repr(error))
