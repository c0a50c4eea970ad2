"""OpenAI's shapes: responses, chunks and errors. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edge.api.tools import Call

MODEL = "anabranch"


@dataclass(frozen=True)
class Head:
    """What every part of a response repeats; ``created`` in seconds since 1970."""

    id: str
    created: int
    student: str


@dataclass(frozen=True)
class Spelled:
    """A token with its bytes, its log-probability in nats, and the likeliest ones beside it."""

    data: bytes
    logprob: float
    top: tuple[Spelled, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a stream sends at once: a delta, and the tokens since the last one if asked for."""

    delta: Mapping[str, Any]
    spelled: tuple[Spelled, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer.

    ``content`` is None where the answer is a ``call``; ``finish_reason`` is ``stop``, ``length`` or
    ``tool_calls``; ``spelled`` is None where nobody asked for log-probabilities.
    """

    head: Head
    content: str | None
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    call: Call | None = None
    spelled: tuple[Spelled, ...] | None = None


def completion_body(completion: Completion) -> dict[str, Any]:
    """The response to a chat request that is not streamed."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": completion.content,
        "refusal": None,
    }
    if completion.call is not None:
        call = completion.call
        function = {"name": call.name, "arguments": call.arguments}
        message["tool_calls"] = [{"id": call.id, "type": "function", "function": function}]
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(completion.spelled),
        "finish_reason": completion.finish_reason,
    }
    return {
        **_head(completion.head, "chat.completion"),
        "choices": [choice],
        "usage": _usage(completion),
    }


def chunk_body(head: Head, piece: Piece, finish_reason: str | None = None) -> dict[str, Any]:
    """One chunk of a streamed response."""
    choice = {
        "index": 0,
        "delta": piece.delta,
        "logprobs": _logprobs(piece.spelled),
        "finish_reason": finish_reason,
    }
    return {**_head(head, "chat.completion.chunk"), "choices": [choice]}


def _logprobs(spelled: Sequence[Spelled] | None) -> dict[str, Any] | None:
    if spelled is None:
        return None
    content = [{**_token(t), "top_logprobs": [_token(other) for other in t.top]} for t in spelled]
    return {"content": content, "refusal": None}


def _token(token: Spelled) -> dict[str, Any]:
    return {
        "token": token.data.decode(errors="replace"),
        "logprob": token.logprob,
        "bytes": list(token.data),
    }


def usage_body(completion: Completion) -> dict[str, Any]:
    """The chunk that ends a stream whose request asked for ``include_usage``."""
    return {
        **_head(completion.head, "chat.completion.chunk"),
        "choices": [],
        "usage": _usage(completion),
    }


def error_body(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's clients understand it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def models_body(student: str) -> dict[str, Any]:
    """The response to ``GET /v1/models``: one model, the student in service."""
    model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "anabranch"}
    return {"object": "list", "data": [{**model, "system_fingerprint": student}]}


def _head(head: Head, kind: str) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": MODEL,
        "system_fingerprint": head.student,
    }


def _usage(completion: Completion) -> dict[str, int]:
    prompt, answer = completion.prompt_tokens, completion.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }
