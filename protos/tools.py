"""Tools in a prompt, and the calls that answer it. Edge and cloud both write them here.

A call is compact JSON, ``{"name":…,"arguments":{…}}``: what students are taught to answer, and what
stands in the prompt where an earlier answer was a call.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from protos.prompt import Message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Tool:
    """A function that an answer may call; ``parameters`` is a JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


def compact(value: object) -> str:
    """JSON without spaces; text stays readable.

    >>> compact({"area": "Küche"})
    '{"area":"Küche"}'
    """
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def call_opening(name: str) -> str:
    """How the call of a tool begins, up to its arguments.

    >>> call_opening("lamp")
    '{"name":"lamp","arguments":'
    """
    return f'{{"name":{compact(name)},"arguments":'


def call_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A whole call.

    >>> call_text("lamp", {"on": True})
    '{"name":"lamp","arguments":{"on":true}}'
    """
    return f"{call_opening(name)}{compact(arguments)}}}"


def with_tools(messages: Sequence[Message], system: str, tools: Sequence[Tool]) -> list[Message]:
    r"""Messages whose system message, or else ``system``, goes on with the tools.

    >>> asked = [Message("user", "light!")]
    >>> print(with_tools(asked, "Be brief.", [Tool("lamp", "Switch.")])[0].content)
    Be brief.
    <BLANKLINE>
    To use a tool, answer with one JSON object {"name":…,"arguments":{…}} and nothing else. Tools:
    {"name":"lamp","description":"Switch.","parameters":{}}
    """
    if not tools:
        return list(messages)
    lines = "\n".join(
        compact({"name": t.name, "description": t.description, "parameters": t.parameters})
        for t in tools
    )
    heads = [m.content for m in messages if m.role == "system"] or ([system] if system else [])
    guide = (
        'To use a tool, answer with one JSON object {"name":…,"arguments":{…}} and nothing else. '
        f"Tools:\n{lines}"
    )
    own = [m for m in messages if m.role != "system"]
    return [Message("system", "\n\n".join([*heads, guide])), *own]
