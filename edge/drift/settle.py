"""When is an answer known to be right or wrong: pure rules over the answers still open.

An answer is open until people say something or go on:

- a correction settles it as wrong, at any time, also after it was settled as right;
- an acceptance settles it as right;
- the next request settles every open answer as right: who asks on without a word was content.
"""

from __future__ import annotations

RIGHT, WRONG = 0.0, 1.0

Open = tuple[str, ...]
"""Ids of completions that nobody has judged yet."""


def answered(still_open: Open, completion: str) -> Open:
    """An answer was given."""
    return (*still_open, completion)


def asked_on(still_open: Open) -> tuple[Open, list[float]]:
    """The next request arrived; returns what is open now and what was learned.

    >>> asked_on(("a", "b"))
    ((), [0.0, 0.0])
    """
    return (), [RIGHT] * len(still_open)


def judged(still_open: Open, completion: str, *, corrected: bool) -> tuple[Open, list[float]]:
    """Somebody judged an answer; returns what is open now and what was learned.

    A correction that comes late is harm all the same, so it counts; an acceptance that comes late
    was counted already.

    >>> judged(("a",), "a", corrected=True)
    ((), [1.0])
    >>> judged((), "a", corrected=True), judged((), "a", corrected=False)
    (((), [1.0]), ((), []))
    """
    rest = tuple(c for c in still_open if c != completion)
    if corrected:
        return rest, [WRONG]
    return rest, [RIGHT] if completion in still_open else []
