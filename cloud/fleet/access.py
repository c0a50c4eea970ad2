"""Who may call the fleet service, and how much: what the service asks at each call.

Without TLS nobody can know who calls (:class:`Anybody`); with it, the certificate says
(``cloud/identity/access.py``).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from grpc import aio

    Context = aio.ServicerContext[Any, Any]


class Caller(Protocol):
    """Who calls. Every method raises ``RefusedError`` once that device may not call any more."""

    def check(self) -> object:
        """See that it may still call."""
        ...

    def watching(self, wake: Callable[[], None]) -> AbstractContextManager[None]:
        """A watch stream is open inside; ``wake`` is called when :meth:`check` is worth a try.

        Raises:
            QuotaError: the device has too many.
        """
        ...

    def reading(self) -> AbstractContextManager[None]:
        """A read is under way inside.

        Raises:
            QuotaError: the device has too many, or has read too much.
        """
        ...

    def sent(self, size: int) -> None:
        """Count bytes that went to the device."""
        ...


class Access(Protocol):
    """Tells who calls."""

    def admit(self, context: Context, *, channel: str, device: str | None) -> Caller:
        """Who makes this call.

        Args:
            context: of the call.
            channel: that the message names.
            device: that the message names, if it names one.

        Raises:
            RefusedError: this device may not make it.
        """
        ...


class _Unknown:
    """A caller of whom nothing is known."""

    def check(self) -> None:
        """See :class:`Caller`."""

    def watching(self, wake: Callable[[], None]) -> AbstractContextManager[None]:  # noqa: ARG002
        """See :class:`Caller`."""
        return nullcontext()

    def reading(self) -> AbstractContextManager[None]:
        """See :class:`Caller`."""
        return nullcontext()

    def sent(self, size: int) -> None:
        """See :class:`Caller`."""


class Anybody:
    """Believes what messages say: for one machine, where nobody else can connect."""

    def admit(self, context: Context, *, channel: str, device: str | None) -> Caller:  # noqa: ARG002
        """See :class:`Access`."""
        return _Unknown()
