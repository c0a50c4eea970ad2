"""Network addresses as people write them: ``host:port``."""

from __future__ import annotations

from ipaddress import ip_address
from typing import NamedTuple

from protos.errors import InvalidInputError

_MAX_PORT = 65535


class Address(NamedTuple):
    """A host and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can be there; of a name only ``localhost`` is known.

    >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0"), is_loopback("cloud.example.org")
    (True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def check_plain(host: str, what: str, *, instead: str) -> None:
    """Refuse to talk without TLS across a network.

    Args:
        host: the other end, or where we listen.
        what: what is there, for the message.
        instead: the options that bring TLS, for the message.

    Raises:
        InvalidInputError: the host is not this machine.
    """
    if not is_loopback(host):
        msg = (
            f"{what} at {host} would be without TLS: anybody on the way could read and pretend. "
            f"Give {instead}; or --insecure, in a network of yours alone"
        )
        raise InvalidInputError(msg)


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
