"""Requests that a model writes itself, with its answers to them: anchors without a data set.

A model that was taught to chat, given the beginning of a user's turn and nothing else, goes on with
a request that it was taught on or one like it (Magpie, Xu et al., arXiv 2406.08464). Fifty prompts
that a person wrote hold a student to its base where they ask; what it says elsewhere drifts three
to four times as far. A hundred more, of its own choosing, halve that (docs/learning.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloud.learners.prompts import ANCHOR, GATE, SYSTEM
from cloud.learners.sampling import sample
from protos.prompt import IM_END, IM_START, Message, render

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud.students.source import Source

SAMPLES = 256
"""Requests that are begun; what does not end in time, or was said before, is thrown away."""
_REQUEST_TOKENS = 24
_ANSWER_TOKENS = 24
_TEMPERATURE = 0.8  # at 1.0 a model of this size loses the thread
_BATCH = 128
_SPOILT = IM_START, IM_END, "\N{REPLACEMENT CHARACTER}"  # half a character, where it was cut


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
    tokenizer = source.tokenizer
    system = Message("system", SYSTEM)
    opening = render([system, Message("user", "")], answer=False)
    opening = opening[: opening.rindex(IM_END)]

    def said(texts: list[str], cap: int, end: int, seed: int) -> list[tuple[str, bool]]:
        ids = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
        drawn = sample(source.model, ids, temperature=_TEMPERATURE, cap=cap, end=end, seed=seed)
        found = []
        for tokens in drawn:
            ended = tokens[-1] == end
            text = tokenizer.decode(tokens[: len(tokens) - ended], skip_special_tokens=False)
            spoilt = any(mark in text for mark in _SPOILT)
            found.append(("" if spoilt else text.strip(), ended))
        return found

    known = {p.casefold() for p in ANCHOR + GATE}  # the gate's prompts no training may see
    found: dict[str, None] = {}
    turn_end = tokenizer.token_to_id(IM_END)
    begun = range(0, samples if turn_end is not None else 0, _BATCH)
    for number in begun:
        texts = [opening] * min(_BATCH, samples - number)
        for request, ended in said(texts, _REQUEST_TOKENS, turn_end, seed + number):
            if ended and request and request.casefold() not in known:
                found[request] = None
        progress(0.5 * (number + len(texts)) / samples)
    requests = sorted(found, key=len)  # alike in length: little padding
    written: list[Written] = []
    for number in range(0, len(requests), _BATCH):
        asked = requests[number : number + _BATCH]
        texts = [render([system, Message("user", r)]) for r in asked]
        answers = said(texts, _ANSWER_TOKENS, source.eos[0], seed + samples + number)
        written += [Written(r, a, ended) for r, (a, ended) in zip(asked, answers, strict=True) if a]
        progress(0.5 + 0.5 * (number + len(asked)) / len(requests))
    return written
