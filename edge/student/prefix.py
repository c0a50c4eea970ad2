"""Keys and values of prompts' beginnings, kept by content.

System prompt, tools and working memory stand at the beginning of a prompt, before the message that
is to be answered: its *head*. Heads are kept, the least recently used leaves first; the latest
chat is kept whole, because the next one often goes on from it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.student.engine import KeyValues
    from protos.prompt import Message

_HEAD_GRAIN = 32  # positions; heads are copied once and never grow


@dataclass(frozen=True)
class _Head:
    messages: tuple[Message, ...]
    chat: KeyValues


class PrefixCache:
    """A bounded store.

    Args:
        max_bytes: of all buffers that are kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._heads: OrderedDict[tuple[int, ...], _Head] = OrderedDict()
        self._latest: KeyValues | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        latest = self._latest.nbytes if self._latest else 0
        return latest + sum(h.chat.nbytes for h in self._heads.values())

    @property
    def heads(self) -> tuple[tuple[Message, ...], ...]:
        """Messages of the heads that are kept, the latest first."""
        return tuple(h.messages for h in reversed(self._heads.values()))

    def take(self, ids: Sequence[int], empty: KeyValues) -> KeyValues:
        """Keys and values of the longest known beginning of ``ids``, but for its last token.

        What is returned is the caller's own. ``empty`` is returned where nothing is known.
        """
        wanted = ids[:-1]
        latest = self._latest
        length = shared(latest.ids, wanted) if latest is not None else 0
        best = max(self._heads, key=lambda head: shared(head, wanted), default=())
        known = shared(best, wanted)
        if latest is not None and length and length >= known:
            self._latest = None
            latest.truncate(length)
            return latest
        if known:
            self._heads.move_to_end(best)
            return self._heads[best].chat.copy(known, room=len(ids) + 1)
        return empty

    def keep_head(self, chat: KeyValues, length: int, messages: Sequence[Message]) -> None:
        """Keep a copy of the first ``length`` tokens, which are those of ``messages``."""
        head = tuple(chat.ids[:length])
        if not head:
            return
        for other in reversed(self._heads):
            if other[:length] == head:
                self._heads.move_to_end(other)
                return
        for other in [o for o in self._heads if head[: len(o)] == o]:
            del self._heads[other]
        self._heads[head] = _Head(
            tuple(messages), chat.copy(length, room=length, grain=_HEAD_GRAIN)
        )
        self._shrink()

    def keep_latest(self, chat: KeyValues) -> None:
        """Keep a chat that has ended, in place of the one before; it is the cache's from now on."""
        if chat.ids and chat.nbytes <= self._max_bytes:
            self._latest = chat
            self._shrink()

    def _shrink(self) -> None:
        while self.nbytes > self._max_bytes and self._heads:
            self._heads.popitem(last=False)


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the beginning that two sequences have in common.

    >>> shared([1, 2, 3], [1, 2, 4, 5])
    2
    """
    count = 0
    for ours, theirs in zip(one, other, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
