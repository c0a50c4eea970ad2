"""gRPC settings of both ends, in one place, because they must fit each other.

A watch stream is silent for days, so both ends ping to learn that the other is gone. A gRPC server
takes pings that come more often than it allows as abuse and hangs up (GOAWAY, too_many_pings); the
default allows one in five minutes. So what the server allows and how often the device pings are
set together: a device pings each minute, the server allows one each half minute. Home routers
forget idle connections after a few minutes, which the same pings prevent.

Sources: gRPC's keepalive guide (doc/keepalive.md) and gRFC A8 for clients, A9 for servers.
"""

from __future__ import annotations

from typing import Final

Options = tuple[tuple[str, int], ...]

PING_EVERY_MS: Final = 60_000
"""Either end pings after this long without a word."""
PING_TIMEOUT_MS: Final = 20_000
"""A ping without an answer for this long ends the connection.

Set twice: in gRPC 1.85 only ``ping_timeout`` ends one, a minute by default, be it of keepalive or
to measure the line while data comes in (seen with its traces ``http2_ping``, ``http_keepalive``).
"""
PING_ALLOWED_EVERY_MS: Final = 30_000
"""The server hangs up on a device that pings more often; half of what a device does, for slack."""
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""A message's bound, either way: a chunk is 64 KiB, and the rest is less."""
MAX_CHUNK_BYTES: Final = 64 * 1024
"""The most data in one Chunk. gRPC holds some four copies of it for each device that reads."""
MAX_READ_BYTES: Final = 16 * 1024 * 1024
"""The most bytes that one Read call answers; a device asks again for the rest."""

SERVER: Final[Options] = (
    ("grpc.keepalive_time_ms", PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", PING_ALLOWED_EVERY_MS),
    # 0: ping for as long as a stream is silent, not only twice.
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A second cloud on the same port must fail at once instead of taking half of the devices.
    ("grpc.so_reuseport", 0),
)

SERVER_OF_ONE: Final[Options] = (
    # A connection with a certificate is one device's: a watch, some reads, a report.
    ("grpc.max_concurrent_streams", 16),
)
"""More of a server that knows one device behind each connection."""

CLIENT: Final[Options] = (
    ("grpc.keepalive_time_ms", PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    # A device without an open call has its watch stream to open again: nothing to keep alive.
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # gRPC waits up to two minutes between attempts; a cloud that is back is found sooner so.
    ("grpc.initial_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 15_000),
)
