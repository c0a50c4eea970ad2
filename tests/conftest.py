"""Fixtures that several rooms share."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import pytest

from cloud.broker import EmbeddedBroker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Give a loopback port that nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], object]], None]:
    """Wait until a condition holds, and fail if it does not within half a minute."""

    def wait(condition: Callable[[], object]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, "the condition did not come true within 30 s"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[str]:
    """Run a real embedded broker; the value is its ``host:port``."""
    listen = f"127.0.0.1:{free_port()}"
    embedded = EmbeddedBroker(listen=listen, workdir=tmp_path_factory.mktemp("broker"))
    embedded.start()
    yield listen
    embedded.stop()
