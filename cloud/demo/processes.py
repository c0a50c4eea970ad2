"""The demo's processes: each part of the system started as a person would start it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Self

from edge.process import PARENT
from protos.errors import AnabranchError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_START_S = 120
_STOP_S = 15
_POLL_S = 0.1
_TAIL = 15


class DemoError(AnabranchError):
    """The demo cannot go on; the message says why and where to look."""


def free_address() -> str:
    """A loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Processes:
    """Processes of ``anabranch``, each with a log; leaving the context ends them all.

    They stand in sessions of their own, so that Ctrl-C reaches the demo alone and it can end them
    in good order; and they end with it, however it ends.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        """The last started ends first: devices before the cloud, the cloud before the broker."""
        for process in reversed(self._running.values()):
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

    def start(self, name: str, *arguments: str) -> None:
        """Run ``anabranch ARGUMENTS`` under a name; its log is ``LOGS/NAME.log``."""
        with self.log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(  # noqa: S603  # our own command
                [sys.executable, "-m", "cloud.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {PARENT: str(os.getpid())},
            )

    def kill(self, name: str) -> None:
        """End a process as a power cut would; :meth:`start` may start it again."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def log(self, name: str) -> Path:
        """Where a process writes what it has to say."""
        return self._logs / f"{name}.log"

    def check(self) -> None:
        """See that all still run.

        Raises:
            DemoError: one has ended by itself.
        """
        for name, process in self._running.items():
            if process.poll() is not None:
                lines = self.log(name).read_text(errors="replace").splitlines()[-_TAIL:]
                msg = (
                    f"{name} ended by itself with code {process.returncode}; the end of "
                    f"{self.log(name)}:\n" + "\n".join(lines)
                )
                raise DemoError(msg)

    async def note(self, name: str, file: Path) -> dict[str, Any]:
        """Wait until a process has written where it listens (``agent.json``, ``cloud.json``).

        Raises:
            DemoError: it ended, or took too long.
        """
        found: dict[str, Any] = {}

        def written() -> bool:
            try:
                found.update(json.loads(file.read_text()))
            except (OSError, ValueError):
                return False
            return bool(found["pid"] == self._running[name].pid)

        await self.until(written, f"{name} to start", seconds=_START_S)
        return found

    async def listening(self, name: str, address: str) -> None:
        """Wait until a process accepts connections.

        Raises:
            DemoError: it ended, or took too long.
        """
        host, _, port = address.rpartition(":")

        def accepts() -> bool:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
            except OSError:
                return False
            return True

        await self.until(accepts, f"{name} to listen on {address}", seconds=_START_S)

    async def until(self, condition: Callable[[], bool], what: str, *, seconds: float) -> None:
        """Wait for a condition while all processes run.

        Raises:
            DemoError: one ended, or it did not come true in time.
        """
        end = asyncio.get_running_loop().time() + seconds
        while not condition():
            self.check()
            if asyncio.get_running_loop().time() > end:
                msg = f"waited {seconds:.0f} s for {what}; the logs are in {self._logs}"
                raise DemoError(msg)
            await asyncio.sleep(_POLL_S)
