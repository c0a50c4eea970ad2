"""A line between a device and the cloud that is cut, stalls, corrupts and delays on demand."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from concurrent.futures import Future

_BLOCK = 16 * 1024
_ARRIVES = 0.2
"""Seconds between the last byte and a reset, which throws away what a busy device has not read."""


class Trouble(Enum):
    """What happens to a connection."""

    CUT = "both ends are reset, a fifth of a second after the last byte"
    STALL = "nothing goes through any more, and nobody is told"
    CORRUPT = "the lowest bit of a byte is flipped"
    DELAY = "each block from then on waits a hundredth of a second"


@dataclass(frozen=True)
class Ahead:
    """Trouble that comes when so many more bytes have gone to the device."""

    trouble: Trouble
    after: int


class Proxy:
    """Forwards TCP connections from a port of its own to ``upstream``, a port of this machine."""

    def __init__(self, upstream: int) -> None:
        self.port = 0
        self.to_device = 0
        """Bytes that were sent to the device, over all connections."""
        self.ahead: deque[Ahead] = deque()
        """What will happen, in this order; each counts from the one before."""
        self._upstream = upstream
        self._since = 0
        self._slow = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        starting: Future[None] = asyncio.run_coroutine_threadsafe(self._start(), self._loop)
        starting.result(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def expect(self, *ahead: Ahead) -> None:
        """Have trouble come, counted from now."""
        self._since = self.to_device
        self._slow = False
        self.ahead.extend(ahead)

    async def _start(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def _connected(self, device: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        try:
            cloud, up = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            out.transport.abort()
            return
        stalled = asyncio.Event()
        await asyncio.gather(
            self._up(device, up, stalled), self._down(cloud, out, stalled), return_exceptions=True
        )
        out.transport.abort()
        up.transport.abort()

    async def _up(
        self, device: asyncio.StreamReader, up: asyncio.StreamWriter, stalled: asyncio.Event
    ) -> None:
        while data := await device.read(_BLOCK):
            if not stalled.is_set():
                up.write(data)
                await up.drain()
        up.transport.abort()

    async def _down(
        self, cloud: asyncio.StreamReader, out: asyncio.StreamWriter, stalled: asyncio.Event
    ) -> None:
        while data := await cloud.read(_BLOCK):
            if stalled.is_set():
                continue
            data, trouble = self._meet(data)
            self.to_device += len(data)
            out.write(data)
            await out.drain()
            if trouble is Trouble.CUT:
                await asyncio.sleep(_ARRIVES)
                break
            if trouble is Trouble.STALL:
                stalled.set()
            if self._slow:
                await asyncio.sleep(0.01)
        out.transport.abort()

    def _meet(self, data: bytes) -> tuple[bytes, Trouble | None]:
        """What of a block goes through, and what happens after it."""
        if not self.ahead or self.to_device + len(data) < self._since + self.ahead[0].after:
            return data, None
        met = self.ahead.popleft()
        at = self._since + met.after - self.to_device
        self._since += met.after
        if met.trouble is Trouble.CORRUPT:
            data = data[: at - 1] + bytes([data[at - 1] ^ 1]) + data[at:]
        if met.trouble is Trouble.DELAY:
            self._slow = True
        return (data[:at] if met.trouble is Trouble.CUT else data), met.trouble
