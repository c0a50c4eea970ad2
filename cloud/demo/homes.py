"""Homes for simulated people: their rooms and what stands in them."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Home:
    """A household as Home Assistant would know it; everything lower-case, as spoken.

    Attributes:
        name: what to call the home in reports.
        areas: its rooms.
        things: for each Home Assistant domain (``light``, ``media_player``, …) the names of the
            home's things, each with the room it stands in. Left out of the hash, so that a home
            can key a cache; do not change it after construction.

    Raises:
        ValueError: a thing stands in a room that the home does not have, or two share a name.

    >>> flat = Home("flat", ("kitchen",), {"light": {"floor lamp": "kitchen"}})
    >>> flat.things["light"]["floor lamp"]
    'kitchen'
    """

    name: str
    areas: tuple[str, ...]
    things: Mapping[str, Mapping[str, str]] = field(hash=False)

    def __post_init__(self) -> None:
        """Refuse a home that contradicts itself."""
        seen: set[str] = set()
        for things in self.things.values():
            for thing, area in things.items():
                if area not in self.areas:
                    message = f"home {self.name!r} has no {area!r} for {thing!r}; add the area"
                    raise ValueError(message)
                if thing in seen:
                    message = f"home {self.name!r}: two things are called {thing!r}; rename one"
                    raise ValueError(message)
                seen.add(thing)


HOME_A = Home(
    name="A",
    areas=("kitchen", "living room", "bedroom", "bathroom", "hallway", "office"),
    things={
        "light": {
            "ceiling light": "living room",
            "floor lamp": "living room",
            "reading lamp": "bedroom",
            "desk lamp": "office",
            "mirror light": "bathroom",
            "counter lights": "kitchen",
        },
        "switch": {
            "coffee maker": "kitchen",
            "kettle": "kitchen",
            "towel warmer": "bathroom",
            "air purifier": "bedroom",
        },
        "media_player": {
            "tv": "living room",
            "soundbar": "living room",
            "kitchen speaker": "kitchen",
            "clock radio": "bedroom",
        },
        "climate": {"thermostat": "hallway", "radiator": "bedroom"},
        "cover": {
            "left curtain": "living room",
            "right curtain": "living room",
            "roller blind": "bedroom",
        },
    },
)

HOME_B = Home(
    name="B",
    areas=("kitchen", "living room", "bedroom", "dining room", "nursery", "basement", "garage"),
    things={
        "light": {
            "chandelier": "dining room",
            "floor lamp": "living room",
            "night light": "nursery",
            "bedside lamp": "bedroom",
            "fairy lights": "living room",
            "workbench light": "garage",
        },
        "switch": {
            "coffee maker": "kitchen",
            "dishwasher": "kitchen",
            "humidifier": "nursery",
            "dehumidifier": "basement",
            "christmas tree": "living room",
        },
        "media_player": {
            "tv": "living room",
            "record player": "living room",
            "projector": "basement",
            "bedroom speaker": "bedroom",
            "radio": "nursery",
        },
        "climate": {"thermostat": "living room", "heat pump": "basement"},
        "cover": {"patio awning": "living room", "skylight": "bedroom", "sun screen": "nursery"},
    },
)

HOME_C = Home(
    name="C",
    areas=("kitchen", "lounge", "guest room", "study", "hallway", "attic", "garden"),
    things={
        "light": {
            "ceiling light": "study",
            "standing lamp": "lounge",
            "spotlights": "kitchen",
            "bedside lamp": "guest room",
            "string lights": "garden",
            "stair light": "hallway",
        },
        "switch": {
            "espresso machine": "kitchen",
            "kettle": "kitchen",
            "fountain": "garden",
            "electric blanket": "guest room",
            "printer": "study",
        },
        "media_player": {
            "stereo": "lounge",
            "apple tv": "lounge",
            "soundbar": "lounge",
            "garden speaker": "garden",
            "study speaker": "study",
        },
        "climate": {"air conditioner": "attic", "floor heating": "lounge"},
        "cover": {"big curtain": "lounge", "roller blind": "study", "roof hatch": "attic"},
    },
)

HOMES = (HOME_A, HOME_B, HOME_C)
