"""Guidance: which tokens may follow, by a grammar (llguidance).

Where only one text may follow, its tokens are forced: nothing is chosen. Which tokens a forced text
becomes is decided by the bundle's own ``tokenizer.json``, inside llguidance: it encodes the tokens
before and the forced bytes together and gives only the tokens that no further byte could change.
So the student reads what it would read had a person written the answer.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from protos.errors import InvalidInputError
from protos.tools import call_opening

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

_COMPACT: dict[str, Any] = {"whitespace_flexible": False}
_KEPT = 16  # grammars that stay compiled
_OPEN_ENDED = frozenset(
    {"allOf", "if", "not", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"}
)
_ALTERNATIVES = frozenset({"anyOf", "oneOf", "$ref"})


class GrammarError(InvalidInputError):
    """A schema cannot guide: it is no JSON schema, or too complex, or has unknown keywords."""


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """Grammar of the JSON that satisfies ``schema``: compact, keys in the order of the schema.

    An object that lists properties and does not speak of others gets no others. ``x-guidance`` in
    the schema sets llguidance's own options, such as ``item_separator``.

    Raises:
        GrammarError: the schema cannot be written as JSON.
    """
    try:
        return str(
            LLMatcher.grammar_from_json_schema(
                json.dumps(closed(schema)), {"whitespace_flexible": False}
            )
        )
    except ValueError as error:
        msg = f"the JSON schema cannot guide: {error}"
        raise GrammarError(msg) from error


def calls_grammar(
    tools: Mapping[str, Mapping[str, Any]], otherwise: Mapping[str, Any] | None, *, must_call: bool
) -> str:
    """Grammar of an answer that calls one tool, or may.

    Args:
        tools: the JSON schema of the arguments of each tool, by name; not empty.
        otherwise: schema of an answer that calls none; None: free text that does not begin with
            a brace.
        must_call: one of the tools must be called.
    """
    rules = ["start: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    if not must_call:
        rules[0] += " | other"
        rules.append(
            r"other: /([^{](.|\n)*)?/"
            if otherwise is None
            else f"other: %json {_inline(otherwise)}"
        )
    for i, (name, parameters) in enumerate(tools.items()):
        rules.append(f'call_{i}: {json.dumps(call_opening(name))} arguments_{i} "}}"')
        rules.append(f"arguments_{i}: %json {_inline(parameters)}")
    return str(LLMatcher.grammar_from_lark("\n".join(rules)))


def _inline(schema: Mapping[str, Any]) -> str:
    guidance = {**_COMPACT, **schema.get("x-guidance", {})}
    return json.dumps({**closed(schema), "x-guidance": guidance})


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with ``additionalProperties: false`` where an object does not speak of others.

    Whatever satisfies the result satisfies the schema. A schema that combines others, where an
    object's properties may be listed elsewhere, stays as it is.

    >>> closed({"type": "object", "properties": {"a": {"type": "string"}}})["additionalProperties"]
    False
    """
    result: dict[str, Any] = dict(schema) if _combines(schema) else _close(schema)
    return result


def _combines(node: object) -> bool:
    if isinstance(node, list):
        return any(map(_combines, node))
    if not isinstance(node, dict):
        return False
    keys = node.keys()
    beside = "properties" in keys and bool(keys & _ALTERNATIVES)
    return bool(keys & _OPEN_ENDED) or beside or any(map(_combines, node.values()))


def _close(node: Any, *, names: bool = False) -> Any:  # noqa: ANN401 - whatever JSON holds
    """``names``: the node's keys are names of properties or definitions, not keywords."""
    if isinstance(node, list):
        return [_close(n) for n in node]
    if not isinstance(node, dict):
        return node
    kept = {
        k: v
        if not names and k in {"enum", "const", "default", "examples", "x-guidance"}
        else _close(v, names=not names and k in {"properties", "$defs", "definitions"})
        for k, v in node.items()
    }
    if not names and isinstance(node.get("properties"), dict) and "patternProperties" not in node:
        kept.setdefault("additionalProperties", False)
    return kept


class Guide:
    """Follows one answer through its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may follow [vocabulary].

        Raises:
            GrammarError: the grammar turned out too complex.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        bits = np.unpackbits(
            packed, count=min(self._vocabulary, packed.size * 8), bitorder="little"
        )
        if bits.size < self._vocabulary:
            bits = np.pad(bits, (0, self._vocabulary - bits.size))
        mask: npt.NDArray[np.bool_] = bits.view(np.bool_)
        return mask

    def forced(self) -> list[int]:
        """Tokens that must follow; they are not consumed."""
        tokens: list[int] = [] if self.complete else self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def consume(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that may follow."""
        if tokens and not self._matcher.consume_tokens(list(tokens)):
            self._check()
            msg = f"the grammar does not allow the tokens {list(tokens)}"
            raise GrammarError(msg)

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens`` may follow."""
        return 0 if self.complete else int(self._matcher.validate_tokens(list(tokens)))

    def back(self, count: int) -> None:
        """Go back by ``count`` tokens."""
        if count:
            self._matcher.rollback(count)

    def _check(self) -> None:
        if self._matcher.is_error():
            msg = f"the schema cannot guide: {self._matcher.get_error()}"
            raise GrammarError(msg)


class Guides:
    """Makes guides for one student.

    Args:
        tokenizer: path of its ``tokenizer.json``.
        vocabulary: number of its tokens.
        eos: tokens that end an answer.
    """

    def __init__(self, tokenizer: Path, *, vocabulary: int, eos: Sequence[int]) -> None:
        self._path = tokenizer
        self._vocabulary = vocabulary
        self._eos = list(eos)
        self._tokenizer: LLTokenizer | None = None
        self._matchers: OrderedDict[str, LLMatcher] = OrderedDict()

    @property
    def tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance has it; takes half a second to make, so only when used."""
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                str(self._path), n_vocab=self._vocabulary, eos_token=self._eos
            )
        return self._tokenizer

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; none for special tokens."""
        if self.tokenizer.is_special_token(token):
            return b""
        return bytes(self.tokenizer.decode_bytes([token]))

    def follow(self, grammar: str) -> Guide:
        """A guide at the beginning of an answer.

        Raises:
            GrammarError: no answer can satisfy the grammar, or it is too complex.
        """
        matcher = self._matchers.pop(grammar, None)
        if matcher is None:
            matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        guide = Guide(matcher.deep_copy(), self._vocabulary)
        guide.forced()  # raises where the grammar is broken
        self._matchers[grammar] = matcher
        while len(self._matchers) > _KEPT:
            self._matchers.popitem(last=False)
        return guide
