"""Which demonstrations a prompt should show: pure functions over texts.

Texts are compared without case, punctuation or word order. On unseen home commands with 100 others
in memory, the nearest had the right intent in 75% (media) and 71% (lights) of cases by sorted
tokens, in 61% and 68% by plain edit distance, in 35% and 43% by rapidfuzz's WRatio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rapidfuzz import fuzz, process, utils

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.prompt import Message


def normal(text: str) -> str:
    """Text as it is compared.

    >>> normal("  Turn on the LAMP! ")
    'turn on the lamp'
    """
    return " ".join(utils.default_process(text).split())


def asked(messages: Sequence[Message]) -> str:
    """What was asked: the last message of the user; empty without one."""
    return next((m.content for m in reversed(messages) if m.role == "user"), "")


def same_request(messages: Sequence[Message]) -> str:
    """A key that is equal for requests that ask the same in the same conversation.

    The system message is left out: working memory shows none.
    """
    turns = [(m.role, " ".join(m.content.casefold().split())) for m in messages]
    return "\n".join(f"{role}: {text}" for role, text in turns if role != "system")


def nearest(query: str, texts: Sequence[str], *, limit: int, min_similarity: float) -> list[int]:
    """Indices of the texts most similar to ``query``.

    Args:
        query: a text made :func:`normal`.
        texts: such texts, oldest first.
        limit: how many at most.
        min_similarity: 0 (nothing in common) to 1 (same words).

    Returns:
        Most similar last; of equally similar ones the newest is last.

    >>> nearest("lamp on", ["on lamp", "lamp off", "play jazz"], limit=2, min_similarity=0.5)
    [1, 0]
    """
    found = process.extract(
        query,
        texts,
        scorer=fuzz.token_sort_ratio,
        score_cutoff=100 * min_similarity,
        limit=None,
    )
    ranked = sorted(((score, index) for _, score, index in found), reverse=True)[: max(0, limit)]
    return [index for _, index in reversed(ranked)]
