"""What the agent needs of the operating system: a lock, addresses to listen on, a log."""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server

from edge.delta.files import storage_errors
from edge.link.address import Address, parse_address
from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


PARENT = "ANABRANCH_PARENT"
"""Environment variable: the process that :func:`end_with_parent` is not to outlive."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Ask the kernel to end this process with the one that ``ANABRANCH_PARENT`` names, if any.

    A parent that is killed cannot end its children, and two of them must not share a folder.
    """
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        sys.exit(1)


def log_to_stderr() -> None:
    """Log with UTC timestamps, unless the caller has set logging up already."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        formatter = logging.Formatter(
            "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        logging.getLogger("tuf").setLevel(logging.WARNING)  # it tells of each missing signature


def listen_address(text: str) -> Address:
    """Parse ``host:port`` where port 0 stands for any free one.

    Raises:
        InvalidInputError: it is malformed.

    >>> listen_address("127.0.0.1:0")
    Address(host='127.0.0.1', port=0)
    """
    host, _, port = text.rpartition(":")
    if port == "0":
        return Address(parse_address(f"{host}:1").host, 0)
    return parse_address(text)


def give_memory_back() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    Opening a student frees tens of megabytes of graph and tokenizer that glibc would keep.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def locked(state: Path, option: str = "--state") -> Iterator[None]:
    """Hold the state folder: two agents on one state would each undo what the other does.

    ``option`` is how a person names another folder.

    Raises:
        InvalidInputError: another agent holds it.
        StorageError: the folder cannot be made.
    """
    with storage_errors(f"opening the state folder {state}"):
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "lock").open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            msg = (
                f"another process ({holder}) runs on {state}: "
                f"stop it, or give this one another {option}"
            )
            raise InvalidInputError(msg) from error
        with storage_errors(f"writing to {state / 'lock'}"):
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
        yield


@contextmanager
def listening(text: str) -> Iterator[socket.socket]:
    """A socket that listens on ``host:port`` (see :func:`listen_address`).

    Raises:
        InvalidInputError: the address is taken, or not of this machine.
    """
    address = listen_address(text)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.create_server(address, family=family)
    except OSError as error:
        raise _cannot_listen(text, error) from error
    with listener:
        # Connections inherit it; without, a kept connection waits 40 ms for the peer's delayed
        # acknowledgement, since asyncio sets it only for sockets that were made for TCP by name.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


@contextmanager
def metrics_server(text: str, registry: CollectorRegistry) -> Iterator[Address]:
    """Serve ``/metrics`` on ``host:port``; gives the address with its real port.

    Raises:
        InvalidInputError: the address is taken, or not of this machine.
    """
    address = listen_address(text)
    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except OSError as error:
        raise _cannot_listen(text, error) from error
    try:
        yield Address(address.host, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _cannot_listen(text: str, error: OSError) -> InvalidInputError:
    msg = f"cannot listen on {text}: {error.strerror}; give another address, or port 0"
    return InvalidInputError(msg)
