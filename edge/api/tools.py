"""Tools of a request, and the calls in an answer. No I/O."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator, SchemaError

from edge.api.fields import RequestError, field_of
from protos.prompt import IM_END, IM_START
from protos.tools import Tool, call_opening, call_text, compact

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_TOOLS = 128
_REMEMBERED = 16 * 1024  # characters of a schema
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Offer:
    """What an answer may call: ``callable`` of the ``tools`` that the prompt shows, or must."""

    tools: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    must_call: bool = False


@dataclass(frozen=True)
class Call:
    """A tool call of an answer; ``arguments`` is JSON as text, unfinished in a cut answer."""

    id: str
    name: str
    arguments: str


def parse_offer(raw: dict[str, Any]) -> Offer:
    """``tools`` and ``tool_choice`` of a request.

    Raises:
        RequestError: malformed, or the choice names a tool that is not there.
    """
    given = field_of(raw, "tools", list, [])
    if len(given) > MAX_TOOLS:
        msg = f"tools has {len(given)} entries; at most {MAX_TOOLS} are allowed"
        raise RequestError(msg, param="tools")
    tools = tuple(_tool(entry, f"tools[{i}]") for i, entry in enumerate(given))
    by_name = {t.name: t for t in tools}
    if len(by_name) < len(tools):
        msg = "tools has two functions of one name: rename one"
        raise RequestError(msg, param="tools")
    choice = field_of(raw, "tool_choice", (str, dict), "auto" if tools else "none")
    if choice == "none" or (choice == "auto" and not tools):
        return Offer()
    if choice == "auto":
        return Offer(tools, tools)
    if choice == "required":
        if not tools:
            msg = "tool_choice is required, but there are no tools: give some"
            raise RequestError(msg, param="tool_choice")
        return Offer(tools, tools, must_call=True)
    named = choice.get("function") if isinstance(choice, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or name not in by_name:
        msg = (
            "tool_choice must be none, auto, required, or an object of type function that names "
            "one of tools"
        )
        raise RequestError(msg, param="tool_choice")
    return Offer(tools, (by_name[name],), must_call=True)


def _tool(entry: object, where: str) -> Tool:
    function = entry.get("function") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or entry.get("type") != "function":
        msg = f"{where} must be an object of type function"
        raise RequestError(msg, param="tools")
    if not isinstance(function, dict):
        msg = f"{where}.function must be an object with a name"
        raise RequestError(msg, param="tools")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        msg = f"{where}.function.name must have 1 to 64 letters, digits, '_', '-' or '.'"
        raise RequestError(msg, param="tools")
    description = field_of(function, "description", str, "", f"{where}.function")
    parameters = field_of(function, "parameters", dict, {}, f"{where}.function")
    check_schema(parameters, f"{where}.function.parameters", "tools")
    tool = Tool(name, description, parameters or {"type": "object", "properties": {}})
    written = compact([name, description, parameters])
    if IM_START in written or IM_END in written or not _encodable(written):
        msg = f"{where} must be valid Unicode without {IM_START} and {IM_END}"
        raise RequestError(msg, param="tools")
    return tool


def check_schema(schema: dict[str, Any], where: str, param: str) -> None:
    """Refuse what is no JSON schema (draft 2020-12).

    Raises:
        RequestError: it is none.
    """
    try:
        text = json.dumps(schema, sort_keys=True)
        reason = _remembered_fault(text) if len(text) <= _REMEMBERED else _fault(text)
    except RecursionError:
        reason = "too deep"
    if reason is not None:
        msg = f"{where} is not a JSON schema: {reason}"
        raise RequestError(msg, param=param)


def _fault(schema: str) -> str | None:
    """What is wrong with a JSON schema."""
    try:
        Draft202012Validator.check_schema(json.loads(schema))
    except SchemaError as error:
        return str(error.message)
    return None


# Clients send the same schemas again, and checking one takes milliseconds.
_remembered_fault = functools.lru_cache(maxsize=64)(_fault)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_calls(message: dict[str, Any], where: str) -> tuple[list[str], str]:
    """Calls in an assistant's message of the history: their ids, and their text in the prompt.

    Raises:
        RequestError: malformed.
    """
    ids, texts = [], []
    for i, call in enumerate(field_of(message, "tool_calls", list, [], where)):
        place = f"{where}.tool_calls[{i}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            msg = f"{place} must be an object with id and function"
            raise RequestError(msg, param=place)
        identity = field_of(call, "id", str, "", place)
        name = field_of(function, "name", str, "", f"{place}.function")
        try:
            arguments = json.loads(field_of(function, "arguments", str, "{}", f"{place}.function"))
        except (ValueError, RecursionError) as error:
            msg = f"{place}.function.arguments is not JSON: {error}"
            raise RequestError(msg, param=place) from error
        if not name or not isinstance(arguments, dict):
            msg = f"{place}.function needs a name, and arguments that are a JSON object"
            raise RequestError(msg, param=place)
        ids.append(identity)
        texts.append(call_text(name, arguments))
    return ids, "\n".join(texts)


class AnswerStream:
    """Tells content and tool call apart while an answer comes in, as deltas of a stream.

    Args:
        names: of the tools that may be called.
        call_id: of the call, should there be one.

    >>> stream = AnswerStream(["lamp"], "call_1")
    >>> [d for text in ('{"name":"la', 'mp","arguments":{"on', '":1}}') for d in stream.add(text)]
    ... # doctest: +NORMALIZE_WHITESPACE
    [{'tool_calls': [{'index': 0, 'id': 'call_1', 'type': 'function',
      'function': {'name': 'lamp', 'arguments': ''}}]},
     {'tool_calls': [{'index': 0, 'function': {'arguments': '{"o'}}]},
     {'tool_calls': [{'index': 0, 'function': {'arguments': 'n":1}'}}]}]
    >>> stream.end(), stream.call
    ([], Call(id='call_1', name='lamp', arguments='{"on":1}'))
    """

    def __init__(self, names: Sequence[str], call_id: str) -> None:
        self._openings = {call_opening(n): n for n in names}
        self._id = call_id
        self._held = ""
        self._decided = not names
        self._content = ""
        self._name: str | None = None
        self._arguments = ""

    @property
    def call(self) -> Call | None:
        """The call, if the answer is one."""
        return None if self._name is None else Call(self._id, self._name, self._arguments)

    @property
    def content(self) -> str | None:
        """The text; None where the answer is a call."""
        return self._content if self._name is None else None

    def add(self, text: str) -> list[dict[str, Any]]:
        """Take a piece of the answer."""
        self._held += text
        deltas: list[dict[str, Any]] = []
        if not self._decided:
            opening = next((o for o in self._openings if self._held.startswith(o)), None)
            if opening is not None:
                self._name = self._openings[opening]
                self._held = self._held[len(opening) :]
                function = {"name": self._name, "arguments": ""}
                begun = {"index": 0, "id": self._id, "type": "function", "function": function}
                deltas.append({"tool_calls": [begun]})
            elif any(o.startswith(self._held) for o in self._openings):
                return []
            self._decided = True
        # A call's last character closes the call, not its arguments.
        keep = 0 if self._name is None else 1
        return deltas + self._give(len(self._held) - keep)

    def end(self) -> list[dict[str, Any]]:
        """The answer has ended."""
        if self._name is not None and _is_json(self._arguments):
            return []
        return self._give(len(self._held))

    def _give(self, count: int) -> list[dict[str, Any]]:
        text, self._held = self._held[: max(count, 0)], self._held[max(count, 0) :]
        if not text:
            return []
        if self._name is None:
            self._content += text
            return [{"content": text}]
        self._arguments += text
        return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
