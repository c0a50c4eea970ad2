"""What holds a student to the model it was imported as, without a data set.

The imported model's own answers to general prompts; the requests that it wrote itself, with its
answers to them; and how it repeats what it was just shown: working memory lives on that, and a
skill that is learnt without it takes it away.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from cloud.encoder import Encoder
from cloud.learners import prompts
from cloud.students.check import ANSWER_TOKENS, PROMPTS
from cloud.students.importer import ANSWERS, WRITTEN
from cloud.students.magpie import Written, asked_before
from protos.errors import IntegrityError
from protos.prompt import Message, Shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cloud.learners.packing import Example

T = TypeVar("T")


def examples(masters: Path, base: Path, current: Path, tokens: int) -> list[Example]:
    """What the base says by itself, of each answer the first ``tokens`` tokens.

    Many short answers hold better than few long ones: what differs is between prompts.

    Args:
        masters: folder of the imported model, with what it said at its import.
        base: the bundle first imported.
        current: the bundle in service, whose system prompt stands before what is shown.
        tokens: kept of an answer.

    Raises:
        IntegrityError: what the imported model said cannot be read.
    """
    general = Encoder.of(base, prompts.SYSTEM)
    found = [*_answered(general, masters, tokens), *_written(general, masters, tokens)]
    ours = Encoder.of(current)
    for request, answer in prompts.SHOWN:
        shown = Shown((Message("user", request),), answer)
        found.append(_first(ours.example(shown.messages, answer, [shown]), tokens))
    return found


def said(masters: Path) -> dict[str, str]:
    """What the imported model answers to general prompts, by prompt.

    Raises:
        IntegrityError: the file is missing or broken, or lacks a prompt.
    """
    answers: dict[str, str] = _read(masters / ANSWERS, dict)
    if missing := set(PROMPTS) - set(answers):
        msg = f"{masters / ANSWERS} lacks {len(missing)} prompts: import the student again"
        raise IntegrityError(msg)
    return answers


def _read(path: Path, parse: Callable[[Any], T]) -> T:
    try:
        return parse(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        msg = f"{path} cannot be read: import the student again"
        raise IntegrityError(msg) from error


def _answered(encoder: Encoder, masters: Path, tokens: int) -> Iterator[Example]:
    answers = said(masters)
    for prompt in prompts.ANCHOR:
        if answers[prompt]:
            example = encoder.example([Message("user", prompt)], answers[prompt])
            # An answer that long was cut at its import: an end after it is not the model's.
            yield _first(example, min(tokens, ANSWER_TOKENS))


def _written(encoder: Encoder, masters: Path, tokens: int) -> Iterator[Example]:
    """Answers to requests that the model drew as well."""
    for written in _read(masters / WRITTEN, lambda raws: [Written(**raw) for raw in raws]):
        if asked_before(written.request):
            continue  # the gate may have got new prompts since the import
        example = encoder.example([Message("user", written.request)], written.answer)
        if not written.ended:
            example = replace(example, answer=example.answer[:-1])
        yield _first(example, tokens)


def _first(example: Example, tokens: int) -> Example:
    return replace(example, answer=example.answer[:tokens])
