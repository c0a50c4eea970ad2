"""The update client's transport over gRPC.

Calls are synchronous: the client has threads of its own. Keepalive pings (``protos/grpc_options``)
end a connection that died silently; a deadline bounds every call but the watch stream.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc

from edge.update.transport import Piece
from protos import grpc_options
from protos.errors import AnabranchError, IntegrityError, InvalidInputError, UnavailableError
from protos.topics import check_name
from protos.v1 import fleet_pb2, fleet_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

_CALL_SECONDS = 20.0
_METADATA_SECONDS = 120.0
_READ_SECONDS = 600.0  # of one read call, which answers at most 16 MiB
_REFUSED = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
}
# Somebody may revoke by mistake, and enrol again: a device goes on asking.
_NOT_NOW = {
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class GrpcTransport:
    """See :class:`edge.update.transport.Transport`."""

    def __init__(
        self,
        *,
        address: str,
        channel: str,
        device: str,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Connect at the first call.

        Args:
            address: ``host:port`` of the fleet service.
            channel: the device's channel.
            device: the device's name.
            credentials: what it shows and whom it believes; None: without TLS.
        """
        self._channel = check_name(channel, "channel")
        self._device = check_name(device, "device")
        self._address = address
        self._changing = threading.Lock()
        self._closed = False
        self._open(credentials)

    def _open(self, credentials: grpc.ChannelCredentials | None) -> None:
        if credentials is None:
            self._grpc = grpc.insecure_channel(self._address, options=grpc_options.CLIENT)
        else:
            self._grpc = grpc.secure_channel(
                self._address, credentials, options=grpc_options.CLIENT
            )
        self._stub = fleet_pb2_grpc.FleetStub(self._grpc)

    def reconnect(self, credentials: grpc.ChannelCredentials) -> None:
        """Connect anew with these. Calls that are under way end as if the network had failed."""
        with self._changing:
            if self._closed:
                return
            old = self._grpc
            self._open(credentials)
        old.close()

    def watch(self, *, student: str, release: int) -> Iterator[int]:
        """See :class:`~edge.update.transport.Transport`."""
        request = fleet_pb2.WatchRequest(
            channel=self._channel, device=self._device, student=student, release=release
        )
        with self._errors():
            for target in self._stub.Watch(request):
                yield target.release

    def read_metadata(self, name: str) -> Iterator[Piece]:
        """See :class:`~edge.update.transport.Transport`."""
        yield from self._read(fleet_pb2.ReadRequest(metadata=name), _METADATA_SECONDS)

    def read(self, sha256: str, offset: int) -> Iterator[Piece]:
        """See :class:`~edge.update.transport.Transport`."""
        yield from self._read(fleet_pb2.ReadRequest(sha256=sha256, offset=offset), _READ_SECONDS)

    def _read(self, request: fleet_pb2.ReadRequest, seconds: float) -> Iterator[Piece]:
        request.channel = self._channel
        with self._errors():
            call = self._stub.Read(request, timeout=seconds)
            try:
                for chunk in call:
                    yield Piece(chunk.offset, chunk.data, chunk.size)
            finally:
                call.cancel()  # a reader that stops early must not leave the server sending

    def report(self, report: fleet_pb2.UpdateReport) -> None:
        """See :class:`~edge.update.transport.Transport`."""
        whole = fleet_pb2.UpdateReport()
        whole.CopyFrom(report)
        whole.channel, whole.device = self._channel, self._device
        with self._errors():
            self._stub.Report(whole, timeout=_CALL_SECONDS)

    def close(self) -> None:
        """See :class:`~edge.update.transport.Transport`."""
        with self._changing:
            self._closed = True
        self._grpc.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise self._translate(error) from error
        except ValueError as error:
            # So gRPC says that the channel was closed, by close() or by reconnect().
            if "closed channel" not in str(error):
                raise
            msg = f"the connection to the cloud at {self._address} was closed here"
            raise UnavailableError(msg) from error

    def _translate(self, error: grpc.RpcError) -> AnabranchError:
        code, details = error.code(), error.details()
        if code in _REFUSED:
            return InvalidInputError(f"the cloud at {self._address} refused: {details}")
        if code is grpc.StatusCode.DATA_LOSS:
            return IntegrityError(f"the cloud at {self._address} has a damaged file: {details}")
        if code in _NOT_NOW:
            return UnavailableError(
                f"the cloud at {self._address} refuses this device: {details}; asking again later"
            )
        return UnavailableError(
            f"the cloud at {self._address} does not answer ({code.name}: {details}); "
            "asking again later"
        )
