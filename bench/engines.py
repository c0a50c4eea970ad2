"""Engines that answer chats over HTTP, each a process of its own: ours, llama.cpp, genai."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from prometheus_client import CollectorRegistry

from cloud.demo.processes import free_address
from cloud.releases.repository import Repository
from edge.process import PARENT
from protos.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

PEERS = Path("build/bench/student-venv/bin/python")
_SCRIPTS = Path(__file__).parent / "peers"
_START_S = 120
_STOP_S = 15


@dataclass(frozen=True)
class Engine:
    """An engine that serves: process id, address, whether it needs the system prompt in requests.

    An agent has its own (the harness's), and takes a request that brings one for another use.
    """

    name: str
    pid: int
    url: str
    needs_system: bool

    def peak_mb(self) -> float:
        """The most resident memory so far."""
        return round(status_kb(self.pid, "VmHWM") / 1024, 1)

    def resident_mb(self) -> float:
        """Resident memory now."""
        return round(status_kb(self.pid, "VmRSS") / 1024, 1)


def status_kb(pid: int, field: str) -> int:
    """A figure of a process's ``/proc`` status, in KiB; 0 where there is none."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    return 0


def end_in_good_order() -> None:
    """Let SIGTERM end what was started, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@contextmanager
def agent(
    bundle: Path,
    folder: Path,
    *,
    threads: int,
    cloud: str = "",
    extra: tuple[str, ...] = (),
    python: Path = Path(sys.executable),
) -> Iterator[Engine]:
    """``anabranch edge`` on a bundle; broker and cloud may be away, which it survives.

    Raises:
        UnavailableError: it did not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    Repository(state=folder, clock=time.time, registry=CollectorRegistry())
    command = [str(python), "-m", "cloud.cli", "edge", "--device", "bench"]
    command += ["--state", str(folder / "state"), "--student", str(bundle)]
    command += ["--trust", str(folder / "tuf" / "root.json")]
    command += ["--broker", free_address(), "--cloud", cloud or free_address()]
    command += ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--threads", str(threads)]
    note = folder / "state" / "agent.json"
    note.unlink(missing_ok=True)
    with _running([*command, *extra], folder / "agent.log") as process:
        end = time.monotonic() + _START_S
        while not note.exists():
            if process.poll() is not None or time.monotonic() > end:
                msg = f"the agent did not start: {folder / 'agent.log'} says why"
                raise UnavailableError(msg)
            time.sleep(0.1)
        yield Engine(
            "anabranch", process.pid, json.loads(note.read_text())["api"], needs_system=False
        )


@contextmanager
def peer(name: str, script: str, model: Path, folder: Path, *words: str) -> Iterator[Engine]:
    """A peer of ``bench/peers``, which prints its address.

    Raises:
        UnavailableError: its environment is missing, or it did not start.
    """
    if not PEERS.exists():
        msg = f"{PEERS} is missing: `make bench-student` makes it"
        raise UnavailableError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    command = [str(PEERS), str(_SCRIPTS / script), "--model", str(model), *words]
    with _running(command, log, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # noqa: S101 - it is a pipe
        address = process.stdout.readline().decode().strip()
        if not address:
            msg = f"{name} did not start: {log} says why"
            raise UnavailableError(msg)
        yield Engine(name, process.pid, address, needs_system=True)


@contextmanager
def _running(
    command: list[str], log: Path, *, stdout: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout or file,
            stderr=file,
            start_new_session=True,
            env=os.environ | {PARENT: str(os.getpid())},
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Client:
    """Asks an engine."""

    def __init__(self, engine: Engine, system: str, schema: dict[str, Any] | None) -> None:
        self.engine = engine
        self._system = system
        # A connection for each request: engines close those that idle while others have their turn.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(base_url=engine.url, timeout=120, limits=limits)
        self._guided = {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}}
        if schema is None or not self._takes_a_schema():
            self._guided = {}

    @property
    def guided(self) -> bool:
        """Whether the engine was given the schema to decode by."""
        return bool(self._guided)

    def _takes_a_schema(self) -> bool:
        """Older agents refuse one: their answers are free text that should satisfy it."""
        body = self._body("on", 4) | {"response_format": self._guided}
        return self._http.post("/v1/chat/completions", json=body).is_success

    def _body(self, text: str, limit: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        if self.engine.needs_system:
            messages.insert(0, {"role": "system", "content": self._system})
        return {"messages": messages, "temperature": 0, "max_tokens": limit}

    def ask(self, text: str, limit: int) -> tuple[str, dict[str, Any]]:
        """An answer under the schema, and its usage.

        Raises:
            UnavailableError: the engine refused.
        """
        body = self._body(text, limit)
        if self._guided:
            body["response_format"] = self._guided
        return _checked(self._http.post("/v1/chat/completions", json=body), self.engine.name)

    def plain(self, text: str, limit: int) -> dict[str, Any]:
        """Free text of exactly ``limit`` tokens, if the engine can; its usage and timings."""
        body = self._body(text, limit) | {"ignore_eos": True}
        return _checked(self._http.post("/v1/chat/completions", json=body), self.engine.name)[1]

    def first_token_s(self, text: str, limit: int) -> float:
        """Seconds until the first piece of a streamed answer."""
        body = self._body(text, limit) | {"stream": True}
        if self._guided:
            body["response_format"] = self._guided
        start, first = time.perf_counter(), 0.0
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                choices = json.loads(line[6:]).get("choices")
                if choices and choices[0]["delta"].get("content"):
                    first = first or time.perf_counter()
        return (first or time.perf_counter()) - start

    def close(self) -> None:
        """Give the connection back."""
        self._http.close()


def _checked(response: httpx.Response, name: str) -> tuple[str, dict[str, Any]]:
    if not response.is_success:
        msg = f"{name} answered {response.status_code}: {response.text[:200]}"
        raise UnavailableError(msg)
    body = response.json()
    usage = body["usage"] | body.get("timings", {})
    return body["choices"][0]["message"]["content"], usage
