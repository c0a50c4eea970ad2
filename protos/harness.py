"""The harness: everything around the weights that shapes an answer.

It is a file of the student bundle (``harness.json``), so a release may change it without touching
a weight, and it is signed, gated and rolled back in the same way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import jsonschema

from protos.errors import InvalidInputError

VERSION = 1


@dataclass(frozen=True)
class Harness:
    """System prompt, answer schema and decoding settings.

    ``schema`` is a JSON schema (draft 2020-12) that a right answer satisfies, or None where answers
    are free text. With ``guided`` every answer is made to satisfy it: its keys come in the schema's
    order, and what the schema leaves no choice about is not decoded but written; without, the
    schema only judges. ``max_tokens`` bounds an answer. ``memory_shown`` is how many demonstrations
    of the working memory a prompt may show, ``memory_similarity`` (0..1) how near to the request
    they must be: near, because a student that knows its skill is misled by what is merely similar.
    After a drift alarm, when the weights no longer fit, ``memory_similarity_drifted`` holds until
    the next student serves: then even the form of a similar answer helps.
    """

    system: str = "You are a helpful assistant."
    schema: dict[str, Any] | None = None
    guided: bool = False
    max_tokens: int = 96
    memory_shown: int = 3
    memory_similarity: float = 0.8
    memory_similarity_drifted: float = 0.5
    version: int = field(default=VERSION, kw_only=True)

    def to_json(self) -> bytes:
        """Bytes of ``harness.json``.

        The schema keeps its order, which is that of a guided answer. ``guided`` is written only
        where it is set: agents that do not know it then still read the file.
        """
        fields = {k: v for k, v in sorted(asdict(self).items()) if k != "guided" or v}
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Harness:
        """Parse ``harness.json``.

        Raises:
            InvalidInputError: not JSON, of another version, or with a broken schema.
        """
        try:
            raw = json.loads(data)
            if raw.get("version") != VERSION:
                msg = f"harness version {raw.get('version')!r} is not {VERSION}: update the agent"
                raise InvalidInputError(msg)
            harness = cls(**raw)
            harness.check()
            if harness.schema is not None:
                jsonschema.Draft202012Validator.check_schema(harness.schema)
        except (ValueError, TypeError, AttributeError, jsonschema.SchemaError) as error:
            msg = f"harness.json is malformed: {error}"
            raise InvalidInputError(msg) from error
        return harness

    def check(self) -> None:
        """Refuse values that no student can work with.

        Raises:
            InvalidInputError: a field has the wrong type or is out of bounds.
        """
        counts = {"max_tokens": (self.max_tokens, 1), "memory_shown": (self.memory_shown, 0)}
        for name, (value, least) in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                msg = f"harness.json: {name} is {value!r}; it must be a whole number from {least}"
                raise InvalidInputError(msg)
        shares = {
            "memory_similarity": self.memory_similarity,
            "memory_similarity_drifted": self.memory_similarity_drifted,
        }
        for name, share in shares.items():
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                msg = f"harness.json: {name} is {share!r}; it must be from 0 to 1"
                raise InvalidInputError(msg)
        if not isinstance(self.guided, bool) or (self.guided and self.schema is None):
            msg = (
                f"harness.json: guided is {self.guided!r}; it must be true with a schema, or false"
            )
            raise InvalidInputError(msg)
        if not isinstance(self.system, str):
            msg = f"harness.json: system is {self.system!r}; it must be text"
            raise InvalidInputError(msg)

    def breaks_schema(self, answer: str) -> bool:
        """Tell whether an answer violates the schema (never, where there is none).

        >>> Harness(schema={"type": "object", "required": ["name"]}).breaks_schema('{"name":"on"}')
        False
        >>> Harness(schema={"type": "object"}).breaks_schema("Sure! The lamp is on.")
        True
        """
        if self.schema is None:
            return False
        try:
            value = json.loads(answer)
        except ValueError:
            return True
        return not jsonschema.Draft202012Validator(self.schema).is_valid(value)
