"""What `pip install anabranch[edge]` brings to a device, by the installed packages' metadata."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "optimum", "onnx"}


def brought(extra: str) -> set[str]:
    """Names of everything that ours requires with an extra, all the way down."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    ours = [*project["dependencies"], *extras[extra], *(extras["edge"] if extra != "edge" else ())]
    own = [Requirement(text) for text in ours]
    waiting = [(canonicalize_name(r.name), frozenset(r.extras)) for r in own]
    waiting = [each for each in waiting if each[0] != "anabranch"]
    found: set[str] = {name for name, _ in waiting}
    seen = set()
    while waiting:
        package, wanted = waiting.pop()
        if (package, wanted) in seen:
            continue
        seen.add((package, wanted))
        for text in metadata.requires(package) or ():
            required = Requirement(text)
            marker = required.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in {"", *wanted}):
                needed = canonicalize_name(required.name)
                found.add(needed)
                waiting.append((needed, frozenset(required.extras)))
    return found


def test_a_device_installs_no_training_libraries() -> None:
    found = brought("edge")
    assert {"onnxruntime", "tokenizers", "starlette"} <= found
    assert not found & HEAVY


def test_the_walk_through_requirements_sees_what_the_cloud_installs() -> None:
    assert brought("cloud") >= {"torch", "transformers", "onnx"}


@pytest.mark.parametrize("name", ["onnx", "torch"])
def test_what_a_device_lacks_is_there_to_be_found(name: str) -> None:
    """The names above are spelt as the packages are."""
    assert metadata.version(name)
