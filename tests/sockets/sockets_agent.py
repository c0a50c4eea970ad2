"""``anabranch``, impatient: pings and reconnects after a second where a device waits a minute.

The settings are gRPC's own, so what is tested is what happens when they run out.
"""

from __future__ import annotations

from cloud.cli import main
from protos import grpc_options

HASTE = {
    "grpc.keepalive_time_ms": 1_000,
    "grpc.keepalive_timeout_ms": 1_000,
    "grpc.http2.ping_timeout_ms": 1_000,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 500,
}

if __name__ == "__main__":
    grpc_options.CLIENT = tuple({**dict(grpc_options.CLIENT), **HASTE}.items())  # type: ignore[misc]
    main()
