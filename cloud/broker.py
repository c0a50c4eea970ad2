"""The embedded broker: rumqttd out of the package ``iotcore``, for a fleet that has no other.

It keeps nothing: no queues for absent subscribers, no sessions on disk, no user properties. The
link does not need them (``edge/link``). A fleet that outgrows it brings Mosquitto or EMQX.
"""

from __future__ import annotations

import logging
import signal
import threading
from typing import TYPE_CHECKING

from iotcore import Broker, IotCoreBroker

from edge.link.address import parse_address
from protos.errors import UnavailableError

if TYPE_CHECKING:
    from pathlib import Path

_LOG = logging.getLogger(__name__)
MAX_PAYLOAD = 2 * 1024 * 1024
"""Bytes. Far more than evidence may have, so that what is too large reaches the cloud and is
answered there: past this bound the broker drops the connection."""

# Memory: a topic filter keeps at most max_segment_size * max_segment_count bytes of messages for
# slow readers. A device's acknowledgements have a filter of their own, so both are small.
_CONFIG = """\
id = 0

[router]
id = 0
max_connections = {max_connections}
max_outgoing_packet_count = 200
max_segment_size = {max_payload}
max_segment_count = 4

[v5.1]
name = "v5"
listen = "{listen}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 10000
max_payload_size = {max_payload}
max_inflight_count = 100
dynamic_filters = true
"""


class EmbeddedBroker:
    """A broker with one MQTT 5 listener without encryption.

    :meth:`start` runs it in a child process that ends with this one; :meth:`run_forever` makes this
    process the broker.

    Args:
        listen: ``host:port``.
        workdir: where its configuration is written.
        max_connections: devices and clouds together.
    """

    def __init__(self, *, listen: str, workdir: Path, max_connections: int = 10_000) -> None:
        self.address = parse_address(listen)
        workdir.mkdir(parents=True, exist_ok=True)
        config = workdir / "rumqttd.toml"
        config.write_text(
            _CONFIG.format(
                listen=self.address, max_payload=MAX_PAYLOAD, max_connections=max_connections
            )
        )
        self._config = str(config)
        self._child: Broker | None = None

    def start(self) -> None:
        """Run in a child process; return when it listens.

        Raises:
            UnavailableError: the address is taken or not ours, or the broker does not come up.
        """
        child = Broker(config_path=self._config)
        try:
            child.start()
        except (OSError, RuntimeError) as error:
            msg = f"the broker cannot listen on {self.address}: {error}"
            raise UnavailableError(msg) from error
        self._child = child

    def stop(self) -> None:
        """End the child process and free the port."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def run_forever(self) -> None:
        """Be the broker until SIGINT or SIGTERM. From the main thread.

        Raises:
            UnavailableError: the address is taken or not ours, or the broker ends by itself.
        """
        native = IotCoreBroker(config_path=self._config)
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        # rumqttd logs every packet as an error.
        logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
        try:
            native.check_ports()
        except OSError as error:
            msg = f"the broker cannot listen on {self.address}: {error}"
            raise UnavailableError(msg) from error
        # It has no way to stop, and a daemon thread needs none: it ends with the process, however
        # the process ends.
        thread = threading.Thread(target=native.run_forever, name="broker", daemon=True)
        thread.start()
        _LOG.info("broker on %s", self.address)
        while not ended.wait(1.0):
            if not thread.is_alive():
                msg = f"the broker on {self.address} ended by itself: see its log"
                raise UnavailableError(msg)
