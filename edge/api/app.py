"""The HTTP side: routes, limits, errors in OpenAI's shape, server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edge.api import replies, wire
from edge.api.fields import RequestError
from edge.api.replies import Piece
from edge.host import BusyError
from protos.errors import (
    ContextLengthError,
    InvalidInputError,
    StorageError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.types import Receive, Scope, Send

    from edge.api.replies import Completion, Head
    from edge.api.service import Assistant
    from edge.api.wire import ChatRequest
    from edge.metrics import DeviceMetrics

_LOG = logging.getLogger(__name__)
MAX_BODY = 1024 * 1024
"""Bytes of a request."""

_MAX_READ = 16 * MAX_BODY  # a client that still writes would not see the answer
_HUNG_UP = 499  # nginx's number for a client that closed the connection


def create_app(
    *,
    assistant: Assistant[Any],
    metrics: DeviceMetrics,
    status: Callable[[], Mapping[str, object]] = dict,
) -> Starlette:
    """The ASGI application of one device.

    Args:
        assistant: answers and takes feedback.
        metrics: counts requests.
        status: what ``/healthz`` shows besides (release, state of the update).
    """

    async def completions(request: Request) -> Response:
        try:
            parsed = wire.parse_chat(await _json_body(request))
        except RequestError:
            metrics.requests.labels("invalid").inc()
            raise
        return _ChatResponse(assistant, metrics, parsed)

    async def feedback(request: Request) -> Response:
        judged = wire.parse_feedback(await _json_body(request))
        return JSONResponse({"demonstration_id": await assistant.judge(judged)})

    async def models(_: Request) -> Response:
        return JSONResponse(replies.models_body(assistant.student))

    async def healthz(_: Request) -> Response:
        return JSONResponse({**assistant.health(), **status()})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", _guarded(completions), methods=["POST"]),
            Route("/v1/feedback", _guarded(feedback), methods=["POST"]),
            Route("/v1/models", _guarded(models), methods=["GET"]),
            Route("/healthz", _guarded(healthz), methods=["GET"]),
        ],
        exception_handlers={HTTPException: _http_error},
    )


def error_response(error: Exception) -> JSONResponse:
    """What a client is told of an error; a fault of the device is logged."""
    kind, code, param = "server_error", "internal_error", None
    status, message, headers = 500, str(error), None
    match error:
        case RequestError():
            kind, code, param = "invalid_request_error", error.code, error.param
            status = error.status
        case ContextLengthError():
            kind, code, param = "invalid_request_error", "context_length_exceeded", "messages"
            status = 400
        case InvalidInputError():
            kind, code, status = "invalid_request_error", "invalid_value", 400
        case BusyError():
            kind, code, status, headers = (
                "rate_limit_error",
                "device_busy",
                429,
                {"Retry-After": "2"},
            )
        case UnavailableError():
            code, status, headers = "device_stopping", 503, {"Retry-After": "5"}
        case StorageError():
            kind, code, status = "insufficient_storage", "storage_failed", 507
        case _:
            _LOG.error("a request failed", exc_info=error)
            message = f"the device failed ({type(error).__name__}): its log says more"
    body = replies.error_body(message, kind=kind, param=param, code=code)
    return JSONResponse(body, status_code=status, headers=headers)


class _ChatResponse(Response):
    """Answers one chat request, and gives it up when the client hangs up."""

    def __init__(
        self, assistant: Assistant[Any], metrics: DeviceMetrics, request: ChatRequest
    ) -> None:
        self._assistant = assistant
        self._metrics = metrics
        self._request = request
        self._arrived = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        respond = self._stream if self._request.stream else self._whole
        answering = asyncio.ensure_future(respond(scope, receive, send))
        hanging_up = asyncio.ensure_future(_hang_up(receive))
        try:
            await asyncio.wait({answering, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hanging_up.cancel()
            if not answering.done():
                answering.cancel()
                self._metrics.requests.labels("abandoned").inc()
            await asyncio.gather(answering, hanging_up, return_exceptions=True)
        if not answering.cancelled():
            answering.result()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = JSONResponse(replies.completion_body(await self._complete()))
        except Exception as error:  # noqa: BLE001 - every request gets an answer
            response = error_response(error)
        await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Decoding does not wait for a client that reads slowly: others want the student.
        pieces: asyncio.Queue[tuple[Head, Piece] | None] = asyncio.Queue()
        completing = asyncio.ensure_future(
            self._complete(lambda head, piece: pieces.put_nowait((head, piece)))
        )
        completing.add_done_callback(lambda _: pieces.put_nowait(None))
        started = False
        try:
            while (piece := await pieces.get()) is not None:
                if not started:
                    await _start(send, piece[0])
                    started = True
                await _event(send, replies.chunk_body(*piece))
            completion = await completing
            if not started:
                await _start(send, completion.head)
            await _event(
                send, replies.chunk_body(completion.head, Piece({}), completion.finish_reason)
            )
            if self._request.include_usage:
                await _event(send, replies.usage_body(completion))
            await _data(send, b"[DONE]", last=True)
        except Exception as error:  # noqa: BLE001 - every request gets an answer
            response = error_response(error)
            if not started:
                await response(scope, receive, send)
            else:
                await _data(send, bytes(response.body), last=True)
        finally:
            completing.cancel()
            await asyncio.gather(completing, return_exceptions=True)

    async def _complete(self, on_piece: Callable[[Head, Piece], None] | None = None) -> Completion:
        try:
            completion = await self._assistant.complete(self._request, on_piece)
        except Exception as error:
            self._metrics.requests.labels(_outcome(error)).inc()
            raise
        self._metrics.requests.labels("ok").inc()
        self._metrics.seconds.observe(time.monotonic() - self._arrived)
        self._metrics.tokens.inc(completion.completion_tokens)
        return completion


def _outcome(error: Exception) -> str:
    match error:
        case InvalidInputError():
            return "invalid"
        case UnavailableError():
            return "busy"
        case _:
            return "failed"


def _guarded(
    endpoint: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            return Response(status_code=_HUNG_UP)
        except Exception as error:  # noqa: BLE001 - every request gets an answer
            return error_response(error)

    return guarded


def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)  # noqa: S101 - as registered above
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = replies.error_body(message, kind="invalid_request_error", code="unknown_url")
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _json_body(request: Request) -> bytes:
    """Read a body of at most :data:`MAX_BODY` bytes.

    A page in a browser can send other content types to any local port without being asked.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        msg = f"Content-Type is {kind or 'missing'}; it must be application/json"
        raise RequestError(msg, code="invalid_content_type", status=415)
    body, size = bytearray(), 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY:
            body += part
        elif size > _MAX_READ:
            break
    if size > MAX_BODY:
        msg = f"the body has more than {MAX_BODY} bytes, which is the limit: send less"
        raise RequestError(msg, code="request_too_large", status=413)
    return bytes(body)


async def _hang_up(receive: Receive) -> None:
    """Wait until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, head: Head) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await _event(send, replies.chunk_body(head, Piece({"role": "assistant", "content": ""})))


async def _event(send: Send, body: Mapping[str, Any]) -> None:
    await _data(send, json.dumps(body, separators=(",", ":")).encode())


async def _data(send: Send, data: bytes, *, last: bool = False) -> None:
    """One server-sent event."""
    await send(
        {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": not last}
    )
