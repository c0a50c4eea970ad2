"""OpenAI's shapes: requests parsed and checked, responses and errors built. No I/O."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from protos.errors import InvalidInputError
from protos.prompt import Message

MODEL = "anabranch"
MAX_STOPS = 4
MAX_TEMPERATURE = 2.0
_UNSUPPORTED = (
    *("tools", "functions", "tool_choice", "logprobs", "audio", "prediction"),
    "logit_bias",
)
_NEUTRAL = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class RequestError(InvalidInputError):
    """A request is at fault; ``param`` names the field, ``code`` is for programs."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


@dataclass(frozen=True)
class ChatRequest:
    """A checked chat request; None stands for the harness's or the student's own choice."""

    messages: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    store: bool = True

    @property
    def monitored(self) -> bool:
        """Whether the answer tells of drift.

        Not with ``store: false``, and not with a system message of its own: then it is another use
        of the student than the one that the harness describes.
        """
        return self.store and all(m.role != "system" for m in self.messages)


@dataclass(frozen=True)
class Feedback:
    """A checked judgement; ``correction`` is None when the answer was accepted."""

    completion: str
    correction: str | None


@dataclass(frozen=True)
class Head:
    """What every part of a response repeats; ``created`` in seconds since 1970."""

    id: str
    created: int
    student: str


@dataclass(frozen=True)
class Completion:
    """A whole answer. ``finish_reason`` is ``stop`` or ``length``."""

    head: Head
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a request's body, which must be a JSON object.

    Raises:
        RequestError: it is not.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        msg = f"the body is not JSON: {error}"
        raise RequestError(msg, code="invalid_json") from error
    if not isinstance(value, dict):
        msg = f"the body must be a JSON object, not {type(value).__name__}"
        raise RequestError(msg, code="invalid_json")
    return value


def parse_chat(body: bytes) -> ChatRequest:
    """Parse the body of ``POST /v1/chat/completions``.

    Unknown fields are ignored, but those that would change the answer are refused.

    Raises:
        RequestError: malformed, missing, out of bounds or not supported.
    """
    raw = parse_object(body)
    for name in _UNSUPPORTED:
        if raw.get(name):
            msg = f"{name} is not supported by this device: leave it out"
            raise RequestError(msg, param=name, code="unsupported_parameter")
    if _field(raw, "response_format", dict, {"type": "text"}).get("type") != "text":
        msg = "response_format is not supported: the harness says how answers look"
        raise RequestError(msg, param="response_format", code="unsupported_parameter")
    for name, neutral in _NEUTRAL.items():
        if _field(raw, name, (int, float), neutral) != neutral:
            msg = (
                f"{name} must be {neutral:g}: this device decodes greedily or by temperature alone"
            )
            raise RequestError(msg, param=name, code="unsupported_parameter")
    if _field(raw, "n", int, 1) != 1:
        msg = "n must be 1: this device gives one answer at a time"
        raise RequestError(msg, param="n")
    newer, older = "max_completion_tokens", "max_tokens"
    limit_name = newer if raw.get(newer) is not None else older
    limit = _field(raw, limit_name, int, None)
    if limit is not None and limit < 1:
        msg = f"{limit_name} is {limit}; it must be at least 1"
        raise RequestError(msg, param=limit_name)
    temperature = _field(raw, "temperature", (int, float), 0.0)
    if not 0 <= temperature <= MAX_TEMPERATURE:
        msg = f"temperature is {temperature}; it must be from 0 to {MAX_TEMPERATURE:g}"
        raise RequestError(msg, param="temperature")
    seed = _field(raw, "seed", int, None)
    stream = _field(raw, "stream", bool, default=False)
    options = _field(raw, "stream_options", dict, {})
    return ChatRequest(
        messages=_messages(raw),
        max_tokens=limit,
        temperature=float(temperature),
        seed=None if seed is None else seed % 2**63,
        stop=_stop(raw),
        stream=stream,
        include_usage=_field(options, "include_usage", bool, default=False),
        store=_field(raw, "store", bool, default=True),
    )


def parse_feedback(body: bytes) -> Feedback:
    """Parse the body of ``POST /v1/feedback``.

    Raises:
        RequestError: malformed, or it says neither or both of correction and acceptance.
    """
    raw = parse_object(body)
    completion = _field(raw, "completion_id", str, None)
    correction = _field(raw, "correction", str, None)
    accepted = _field(raw, "accepted", bool, default=False)
    if not completion:
        msg = "completion_id is missing: give the id of the answer that this is about"
        raise RequestError(msg, param="completion_id", code="missing_required_parameter")
    if (correction is None) != accepted:
        msg = "give either a correction (the right answer) or accepted: true"
        raise RequestError(msg, param="correction", code="missing_required_parameter")
    if correction is not None:
        if not correction.strip():
            msg = "correction is empty: give the answer that would have been right"
            raise RequestError(msg, param="correction")
        _checked("assistant", correction, "correction")
    return Feedback(completion, correction)


def _messages(raw: dict[str, Any]) -> tuple[Message, ...]:
    messages = _field(raw, "messages", list, [])
    if not messages:
        msg = "messages is missing or empty: give at least one message of the user"
        raise RequestError(msg, param="messages", code="missing_required_parameter")
    parsed = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            msg = f"{where} must be an object with role and content"
            raise RequestError(msg, param=where)
        role = _field(message, "role", str, None, where)
        if role is None:
            msg = f"{where}.role is missing"
            raise RequestError(msg, param=f"{where}.role", code="missing_required_parameter")
        # OpenAI's newer name for the system message.
        parsed.append(
            _checked("system" if role == "developer" else role, _content(message, where), where)
        )
    if parsed[-1].role != "user":
        msg = f"the last message must be the user's, not the {parsed[-1].role}'s"
        raise RequestError(msg, param="messages")
    return tuple(parsed)


def _content(message: dict[str, Any], where: str) -> str:
    """A message's text: a string, or OpenAI's list of parts where all are text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [p.get("text") for p in parts if isinstance(p, dict) and p.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(t, str) for t in texts):
        msg = f"{where}.content must be text: a string, or a list of parts of type text"
        raise RequestError(msg, param=f"{where}.content")
    return "".join(str(t) for t in texts)


def _checked(role: str, content: str, where: str) -> Message:
    try:
        content.encode()
        return Message(role, content)
    except UnicodeEncodeError as error:
        msg = f"{where} is not valid Unicode (half of a surrogate pair): {error.reason}"
        raise RequestError(msg, param=where) from error
    except InvalidInputError as error:
        msg = f"{where}: {error}"
        raise RequestError(msg, param=where) from error


def _stop(raw: dict[str, Any]) -> tuple[str, ...]:
    stop = raw.get("stop")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    good = isinstance(stops, list) and all(isinstance(s, str) and s for s in stops)
    if not good or len(stops) > MAX_STOPS:
        msg = f"stop must be a text or a list of at most {MAX_STOPS} texts, none empty"
        raise RequestError(msg, param="stop")
    return tuple(stops)


def _field(
    raw: dict[str, Any],
    name: str,
    kind: type | tuple[type, ...],
    default: Any = None,  # noqa: ANN401 - whatever JSON holds
    where: str = "",
) -> Any:  # noqa: ANN401 - whatever JSON holds
    """A field of the given kind; null counts as absent, and true is not a number."""
    value = raw.get(name)
    if value is None:
        return default
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        path = f"{where}.{name}" if where else name
        wanted = " or ".join(_NAMES[k] for k in kinds)
        msg = f"{path} must be {wanted}, not {_NAMES.get(type(value), 'null')}"
        raise RequestError(msg, param=path, code="invalid_type")
    return value


_NAMES: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def completion_body(completion: Completion) -> dict[str, Any]:
    """The response to a chat request that is not streamed."""
    message = {"role": "assistant", "content": completion.text, "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": completion.finish_reason,
    }
    return {
        **_head(completion.head, "chat.completion"),
        "choices": [choice],
        "usage": _usage(completion),
    }


def chunk_body(
    head: Head, delta: dict[str, str], finish_reason: str | None = None
) -> dict[str, Any]:
    """One chunk of a streamed response."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return {**_head(head, "chat.completion.chunk"), "choices": [choice]}


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
