"""Fields of a request's JSON, checked. No I/O."""

from __future__ import annotations

import json
from typing import Any

from protos.errors import InvalidInputError


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


def field_of(
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
