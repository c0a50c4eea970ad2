"""Invented facts about one house, to measure what weights can hold: forty answers to memorise.

No answer follows from common sense, and each has neighbours that are asked for in nearly the same
words (four codes, four fuses, four names of pets), so that a student that only learnt the manner
of the answers is right by chance only. A fact is asked in seven ways: four for training, three
that training never sees and that are worded otherwise.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Fact:
    """One fact: its answer (1 to 6 words), and the questions for training and for tests."""

    answer: str
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """Facts of one sort: the things that have one, questions about ``{x}``, and what is drawn.

    ``draw`` makes an answer from a source of randomness; ``facts`` draws again what is taken.
    """

    name: str
    things: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    draw: Callable[[random.Random], str]


def _one_of(words: str) -> Callable[[random.Random], str]:
    pool = tuple(word.strip() for word in words.split(","))
    return lambda rng: rng.choice(pool)


_FIRST = _one_of(
    "Ines, Ruben, Odile, Marek, Tilda, Joris, Nadia, Cormac, Petra, Anselm, Yusuf, Greta"
)
_LAST = _one_of("Calloway, Brandt, Okoye, Lindqvist, Ferrar, Musgrave, Tanaka, Weir, Pohl, Serrano")
_ANIMAL = _one_of("otter, heron, badger, lynx, magpie, newt, gecko, walrus, ibis, marmot")
_STUFF = _one_of("amber, cobalt, velvet, granite, saffron, copper, linen, cedar, quartz, indigo")
_MONTH = _one_of(
    "January, February, March, April, May, June, July, August, September, October, November, "
    "December"
)

KINDS = (
    Kind(
        "code",
        ("garden gate", "garage", "bike shed", "key safe"),
        (
            "What is the code for the {x}?",
            "Which four digits open the {x}?",
            "I am locked out: what do I type in at the {x}?",
            "Tell me the PIN of the {x}.",
        ),
        (
            "What numbers must a visitor enter to get into the {x}?",
            "The {x} has a keypad. How do I unlock it?",
            "Remind me of our {x} combination, please.",
        ),
        lambda rng: f"{rng.randrange(10_000):04}",
    ),
    Kind(
        "due",
        ("water filter", "smoke alarm battery", "boiler seal", "softener salt"),
        (
            "When is the {x} changed?",
            "On what date do we replace the {x}?",
            "What day of the year is the new {x} due?",
            "Which date is in the calendar for swapping the {x}?",
        ),
        (
            "How long can we keep the old {x}?",
            "By when must somebody renew the {x}?",
            "The {x} wears out. Is a day set for putting in another one?",
        ),
        lambda rng: f"{rng.randint(1, 28)} {_MONTH(rng)}",
    ),
    Kind(
        "fuse",
        ("pond pump", "sauna", "workshop", "freezer"),
        (
            "Which fuse is for the {x}?",
            "What is the number of the {x} fuse?",
            "Where in the fuse box is the {x}?",
            "I need to cut the power to the {x}: what do I switch off?",
        ),
        (
            "The {x} has no electricity. What should I check?",
            "Which breaker protects the {x}?",
            "What label does the circuit of the {x} carry?",
        ),
        lambda rng: f"{rng.choice('ABCDEFGH')}{rng.randint(10, 59)}",
    ),
    Kind(
        "hidden",
        ("spare key", "torch", "first-aid kit", "stopcock handle"),
        (
            "Where is the {x}?",
            "Where do we keep the {x}?",
            "In what place can I find the {x}?",
            "Tell me where the {x} is kept.",
        ),
        (
            "I need the {x} quickly. Where should I look?",
            "Did anyone say where they put our {x}?",
            "Can you lead me to the {x}?",
        ),
        _one_of(
            "under the blue flowerpot, behind the piano, inside the grandfather clock, "
            "on top of the bookcase, in the red biscuit tin, below the third stair, "
            "in the umbrella stand, behind the loose brick, inside the old teapot, "
            "under the wicker chair, in the left boot, behind the barometer"
        ),
    ),
    Kind(
        "pet",
        ("Hendersons' dog", "Okafors' cat", "Lindgrens' parrot", "Moreaus' rabbit"),
        (
            "What is the name of the {x}?",
            "What is the {x} called?",
            "How do they call the {x}?",
            "Which name does the {x} answer to?",
        ),
        (
            "I met the {x} outside. Who was that?",
            "What should I shout if I see the {x} run away?",
            "Next door they have an animal, the {x}. Do you remember its name?",
        ),
        _one_of(
            "Biscuit, Quillon, Pepper, Tamsin, Waffle, Bramble, Otto, Zelda, Pickle, Fergus, "
            "Nimbus, Marzipan"
        ),
    ),
    Kind(
        "password",
        ("guest", "garage", "camera", "office"),
        (
            "What is the password of the {x} wifi?",
            "How do I log in to the {x} network?",
            "Give me the passphrase for the {x} wifi.",
            "My phone asks for the key of the {x} network: what is it?",
        ),
        (
            "Somebody wants to go online with the {x} connection. What should they type?",
            "Which secret word does the {x} wireless want?",
            "How can a laptop join our {x} hotspot?",
        ),
        lambda rng: f"{_STUFF(rng)}-{_ANIMAL(rng)}-{rng.randint(10, 99)}",
    ),
    Kind(
        "person",
        ("plumber", "electrician", "gardener", "window cleaner"),
        (
            "Who is our {x}?",
            "What is the name of the {x}?",
            "Which {x} do we call?",
            "Who comes when we need a {x}?",
        ),
        (
            "I have to ring the {x}. Whom do I ask for?",
            "A job for the {x} came up: who usually does it?",
            "Under what name is the {x} in our contacts?",
        ),
        lambda rng: f"{_FIRST(rng)} {_LAST(rng)}",
    ),
    Kind(
        "paint",
        ("nursery", "stairwell", "hall", "dining room"),
        (
            "What is the paint in the {x} called?",
            "Which colour are the walls of the {x}?",
            "What shade did we paint the {x}?",
            "Name the colour on the {x} walls.",
        ),
        (
            "I must touch up a scratch in the {x}. Which tin do I buy?",
            "What did the decorators use in the {x}?",
            "A friend likes the tint of our {x}. What is it?",
        ),
        lambda rng: f"{_STUFF(rng)} {rng.choice(('mist', 'dusk', 'frost', 'smoke', 'dawn'))}",
    ),
    Kind(
        "shelf",
        ("light bulbs", "paint brushes", "spare tiles", "Christmas lights"),
        (
            "Which shelf are the {x} on?",
            "Where in the cellar are the {x}?",
            "What is the number of the shelf with the {x}?",
            "On what shelf did we store the {x}?",
        ),
        (
            "I am downstairs to fetch the {x}. Which rack is it?",
            "We have run out of {x} up here. Where are more?",
            "How is the place marked that holds the {x}?",
        ),
        lambda rng: f"shelf {rng.randint(2, 30)}, bin {rng.randint(2, 30)}",
    ),
    Kind(
        "setting",
        ("wine cooler", "aquarium", "greenhouse", "yoghurt maker"),
        (
            "What temperature is the {x} set to?",
            "At how many degrees do we keep the {x}?",
            "How warm should the {x} be?",
            "To what temperature do I set the {x}?",
        ),
        (
            "Somebody has turned the dial of the {x}. What must it read?",
            "Give me the right thermostat value for our {x}.",
            "Is there a figure in Celsius that the {x} needs?",
        ),
        lambda rng: f"{rng.randint(8, 39)}.{rng.randint(1, 9)} degrees",
    ),
)
"""Ten kinds of four facts each."""

_TRIES = 1000


def facts(seed: int = 0) -> list[Fact]:
    """The facts of the house that ``seed`` invents: forty, kind by kind, no two answers the same.

    Things and questions are the same for every seed; the answers are not.

    Raises:
        InvalidInputError: a kind has too few different answers for its things.
    """
    rng, taken = random.Random(seed), set[str]()
    return [
        Fact(
            answer=_fresh(kind, rng, taken),
            train=tuple(question.format(x=thing) for question in kind.train),
            test=tuple(question.format(x=thing) for question in kind.test),
        )
        for kind in KINDS
        for thing in kind.things
    ]


def _fresh(kind: Kind, rng: random.Random, taken: set[str]) -> str:
    for _ in range(_TRIES):
        answer = kind.draw(rng)
        if answer not in taken:
            taken.add(answer)
            return answer
    msg = f"facts of kind {kind.name!r} have too few different answers: widen what it draws from"
    raise InvalidInputError(msg)
