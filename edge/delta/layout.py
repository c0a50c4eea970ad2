"""What ``student.json`` says of a weights file, as far as deltas need it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge.delta.encode import Stretch
from edge.delta.format import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

_SAME = ("dtype", "shape", "size")


def tensors_in(config: Mapping[str, Any]) -> list[Tensor]:
    """The matrices of codes of a weights file, by offset; none if ``config`` lists no tensors."""
    known = {raw["name"]: raw for raw in config.get("tensors", ())}
    found = []
    for name, raw in known.items():
        if raw["dtype"] == "uint8":
            rows, columns = raw["shape"]
            scales = known[f"{name}.scales"]
            block = columns // scales["shape"][1]
            found.append(Tensor(raw["offset"], rows, columns, scales["offset"], block))
    return sorted(found, key=lambda tensor: tensor.offset)


def stretches_between(base: Mapping[str, Any], target: Mapping[str, Any]) -> list[Stretch] | None:
    """Where the target's tensors stand in the base: those of one name, type and shape.

    None: all stand where they stood, or nothing is known of them. What has no counterpart (a tensor
    that was added, or has another size) is in no stretch; what was removed is in none either.
    """
    known = {raw["name"]: raw for raw in base.get("tensors", ())}
    wanted = sorted(target.get("tensors", ()), key=lambda raw: int(raw["offset"]))
    if wanted == sorted(known.values(), key=lambda raw: int(raw["offset"])):
        return None
    same = [
        raw for raw in wanted if all(known.get(raw["name"], {}).get(k) == raw[k] for k in _SAME)
    ]
    return [Stretch(raw["offset"], known[raw["name"]]["offset"], raw["size"]) for raw in same]
