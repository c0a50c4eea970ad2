"""Requests that a model writes itself, with its answers to them: anchors without a data set.

A model that was taught to chat, given the beginning of a user's turn and nothing else, goes on with
a request that it was taught on or one like it (Magpie, Xu et al., arXiv 2406.08464). Prompts that a
person wrote hold a student to its base where they ask; elsewhere it drifts several times as far
(docs/adr/0017).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloud.learners.prompts import ANCHOR, GATE, SYSTEM
from cloud.learners.sampling import sample
from protos.prompt import IM_END, Message, render

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloud.students.source import Source

SAMPLES = 256
"""Requests that are begun; what does not end in time, or was said before, is thrown away."""
_REQUEST_TOKENS = 28
_ANSWER_TOKENS = 24
_TEMPERATURE = 0.8  # at 1.0 a model of this size loses the thread
_BATCH = 128
_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Written:
    """A request and its answer, in text; ``ended`` is False where the answer was cut."""

    request: str
    answer: str
    ended: bool


def write(
    source: Source, *, seed: int, progress: Callable[[float], None], samples: int = SAMPLES
) -> list[Written]:
    """Let a model write requests and answer them.

    Args:
        source: the model. One that was not taught to chat writes few that end, or none.
        seed: of what is drawn: the same model and machine write the same again.
        progress: is told the part done, 0..1.
        samples: requests begun.
    """
    system = Message("system", SYSTEM)
    opening = render([system, Message("user", "")], answer=False)
    opening = opening[: opening.rindex(IM_END)]
    found: dict[str, str] = {}
    for begin in range(0, samples, _BATCH):
        texts = [opening] * min(_BATCH, samples - begin)
        for request, ended in _said(source, texts, _REQUEST_TOKENS, seed + begin):
            if ended and request and not asked_before(request):
                found.setdefault(_words(request), request)
        progress(0.5 * (begin + len(texts)) / samples)
    requests = sorted(found.values(), key=len)  # alike in length: little padding
    written: list[Written] = []
    for begin in range(0, len(requests), _BATCH):
        asked = requests[begin : begin + _BATCH]
        texts = [render([system, Message("user", request)]) for request in asked]
        answers = _said(source, texts, _ANSWER_TOKENS, seed + samples + begin)
        written += [Written(r, a, ended) for r, (a, ended) in zip(asked, answers, strict=True) if a]
        progress(0.5 + 0.5 * (begin + len(asked)) / len(requests))
    progress(1.0)
    return written


def asked_before(request: str) -> bool:
    """Whether a prompt of ours is in it: the gate's no training may see.

    >>> asked_before("what is  DNA"), asked_before("What is RNA?")
    (True, False)
    """
    words = f" {_words(request)} "
    return any(f" {_words(prompt)} " in words for prompt in GATE + ANCHOR)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _said(source: Source, texts: Sequence[str], cap: int, seed: int) -> list[tuple[str, bool]]:
    """What follows each text up to the end of the turn, and whether it came; "" is of no use."""
    tokenizer = source.tokenizer
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    end = tokenizer.token_to_id(IM_END)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    said = []
    for tokens in sample(source.model, ids, temperature=_TEMPERATURE, cap=cap, end=end, seed=seed):
        ended = tokens[-1] == end
        text = tokens[:-1] if ended else tokens
        # Inside a text they would be read as turns of a chat.
        spoilt = not special.isdisjoint(text)
        words = "" if spoilt else tokenizer.decode(text).rstrip(_HALF_A_CHARACTER).strip()
        said.append((words, ended))
    return said
