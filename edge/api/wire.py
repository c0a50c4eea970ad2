"""OpenAI's shapes: requests, parsed and checked. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edge.api.fields import RequestError, field_of, parse_object
from edge.api.tools import Offer, check_schema, parse_calls, parse_offer
from protos.errors import InvalidInputError
from protos.prompt import ASKING, Message

MAX_STOPS = 4
MAX_TEMPERATURE = 2.0
MAX_TOP_LOGPROBS = 20
_UNSUPPORTED = ("functions", "function_call", "audio", "prediction", "logit_bias")
_NEUTRAL = {"top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class ChatRequest:
    """A checked chat request; None stands for the harness's or the student's own choice.

    ``schema`` is what a content must satisfy; ``top_logprobs`` is None where log-probabilities are
    not asked for.
    """

    messages: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    store: bool = True
    offer: Offer = field(default_factory=Offer)
    schema: dict[str, Any] | None = None
    top_logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the harness says what to answer and how.

        A request with a system message, tools or a response format of its own is another use of
        the student than the one that the harness describes.
        """
        own = any(m.role == "system" for m in self.messages)
        return not own and not self.offer.tools and self.schema is None

    @property
    def monitored(self) -> bool:
        """Whether the answer tells of drift: where it is plain, and not with ``store: false``."""
        return self.store and self.plain


@dataclass(frozen=True)
class Feedback:
    """A checked judgement; ``correction`` is None when the answer was accepted."""

    completion: str
    correction: str | None


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
    for name, neutral in _NEUTRAL.items():
        if field_of(raw, name, (int, float), neutral) != neutral:
            msg = (
                f"{name} must be {neutral:g}: this device decodes greedily or by temperature alone"
            )
            raise RequestError(msg, param=name, code="unsupported_parameter")
    if field_of(raw, "n", int, 1) != 1:
        msg = "n must be 1: this device gives one answer at a time"
        raise RequestError(msg, param="n")
    newer, older = "max_completion_tokens", "max_tokens"
    limit_name = newer if raw.get(newer) is not None else older
    limit = field_of(raw, limit_name, int, None)
    if limit is not None and limit < 1:
        msg = f"{limit_name} is {limit}; it must be at least 1"
        raise RequestError(msg, param=limit_name)
    temperature = field_of(raw, "temperature", (int, float), 0.0)
    if not 0 <= temperature <= MAX_TEMPERATURE:
        msg = f"temperature is {temperature}; it must be from 0 to {MAX_TEMPERATURE:g}"
        raise RequestError(msg, param="temperature")
    seed = field_of(raw, "seed", int, None)
    stream = field_of(raw, "stream", bool, default=False)
    options = field_of(raw, "stream_options", dict, {})
    return ChatRequest(
        messages=_messages(raw),
        max_tokens=limit,
        temperature=float(temperature),
        seed=None if seed is None else seed % 2**63,
        stop=_stop(raw),
        stream=stream,
        include_usage=field_of(options, "include_usage", bool, default=False),
        store=field_of(raw, "store", bool, default=True),
        offer=parse_offer(raw),
        schema=_response_schema(raw),
        top_logprobs=_top_logprobs(raw),
    )


def parse_feedback(body: bytes) -> Feedback:
    """Parse the body of ``POST /v1/feedback``.

    Raises:
        RequestError: malformed, or it says neither or both of correction and acceptance.
    """
    raw = parse_object(body)
    completion = field_of(raw, "completion_id", str, None)
    correction = field_of(raw, "correction", str, None)
    accepted = field_of(raw, "accepted", bool, default=False)
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
    messages = field_of(raw, "messages", list, [])
    if not messages:
        msg = "messages is missing or empty: give at least one message of the user"
        raise RequestError(msg, param="messages", code="missing_required_parameter")
    parsed: list[Message] = []
    called: set[str] = set()
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            msg = f"{where} must be an object with role and content"
            raise RequestError(msg, param=where)
        role = field_of(message, "role", str, None, where)
        if role is None:
            msg = f"{where}.role is missing"
            raise RequestError(msg, param=f"{where}.role", code="missing_required_parameter")
        content = ""
        if role == "assistant" and message.get("tool_calls"):
            ids, content = parse_calls(message, where)
            called.update(ids)
        elif role == "tool" and message.get("tool_call_id") not in called:
            msg = f"{where}: tool_call_id must be that of a call in an assistant's message before"
            raise RequestError(msg, param=where)
        if message.get("content") is not None or not content:
            content = "\n".join(filter(None, [_content(message, where), content]))
        # OpenAI's newer name for the system message.
        parsed.append(_checked("system" if role == "developer" else role, content, where))
    if parsed[-1].role not in ASKING:
        msg = f"the last message must be the user's or a tool's, not the {parsed[-1].role}'s"
        raise RequestError(msg, param="messages")
    return tuple(parsed)


def _response_schema(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that ``response_format`` asks for, None where text is free."""
    name = "response_format"
    given = field_of(raw, name, dict, {"type": "text"})
    match given.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            named = field_of(given, "json_schema", dict, {}, name)
            schema = named.get("schema")
            if not isinstance(schema, dict):
                msg = f"{name}.json_schema.schema is missing: give a JSON schema"
                raise RequestError(msg, param=name, code="missing_required_parameter")
            check_schema(schema, f"{name}.json_schema.schema", name)
            return schema
        case other:
            msg = f"{name}.type is {other!r}; it must be text, json_object or json_schema"
            raise RequestError(msg, param=name)


def _top_logprobs(raw: dict[str, Any]) -> int | None:
    wanted = field_of(raw, "logprobs", bool, default=False)
    count = field_of(raw, "top_logprobs", int, None)
    if count is None:
        return 0 if wanted else None
    if not wanted or not 0 <= count <= MAX_TOP_LOGPROBS:
        msg = f"top_logprobs is {count}; it must be 0 to {MAX_TOP_LOGPROBS}, with logprobs: true"
        raise RequestError(msg, param="top_logprobs")
    return int(count)


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
