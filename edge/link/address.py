"""Network addresses as people write them: ``host:port``."""

from __future__ import annotations

from typing import NamedTuple

from protos.errors import InvalidInputError

_MAX_PORT = 65535


class Address(NamedTuple):
    """A host and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Parse ``host:port``; an IPv6 address stands in brackets.

    Raises:
        InvalidInputError: no host, or no port between 1 and 65535.

    >>> parse_address("127.0.0.1:1883")
    Address(host='127.0.0.1', port=1883)
    >>> str(parse_address("[::1]:1883"))
    '[::1]:1883'
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) <= _MAX_PORT):
        msg = f"{text!r} is not an address: write host:port, for instance 127.0.0.1:1883"
        raise InvalidInputError(msg)
    return Address(host, int(port))
