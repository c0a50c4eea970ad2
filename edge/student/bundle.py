"""A student bundle: the folder of five files that a device runs, and its digest.

=================  ==========================================================================
``graph.onnx``     the fused graph, without weights
``weights.bin``    every weight; a delta touches its bytes in place
``tokenizer.json`` Hugging Face tokenizers format
``student.json``   architecture, special tokens, context length, layout of ``weights.bin``
``harness.json``   system prompt, answer schema, decoding settings
=================  ==========================================================================

The digest of a bundle is the SHA-256 of its listing: one line ``name sha256 size`` for each file in
the order above. It names releases and slots.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protos.errors import IntegrityError, InvalidInputError
from protos.harness import Harness

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

WEIGHTS = "weights.bin"
FILES = ("graph.onnx", WEIGHTS, "tokenizer.json", "student.json", "harness.json")


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle; ``size`` in bytes."""

    name: str
    sha256: str
    size: int


def sha256_file(path: Path) -> str:
    """SHA-256 of a file as lower-case hex, read in bounded memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(files: Iterable[BundleFile]) -> str:
    """The digest of a bundle from its listing.

    Raises:
        InvalidInputError: the listing is not exactly the five files of :data:`FILES`.
    """
    by_name = {f.name: f for f in files}
    if sorted(by_name) != sorted(FILES):
        msg = f"a student bundle holds exactly {', '.join(FILES)}; this one lists {sorted(by_name)}"
        raise InvalidInputError(msg)
    listing = "".join(f"{n} {by_name[n].sha256} {by_name[n].size}\n" for n in FILES)
    return hashlib.sha256(listing.encode()).hexdigest()


def list_files(folder: Path) -> list[BundleFile]:
    """Hash every file of a bundle.

    Raises:
        IntegrityError: a file is missing.
    """
    try:
        return [BundleFile(n, sha256_file(folder / n), (folder / n).stat().st_size) for n in FILES]
    except FileNotFoundError as error:
        msg = f"{folder} is not a whole student bundle: {error.filename} is missing"
        raise IntegrityError(msg) from error


def digest(folder: Path) -> str:
    """The digest of the bundle in ``folder``, from its bytes."""
    return digest_of(list_files(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """``student.json`` as a dictionary."""
    config: dict[str, Any] = json.loads((folder / "student.json").read_bytes())
    return config


def read_harness(folder: Path) -> Harness:
    """``harness.json``, checked."""
    return Harness.from_json((folder / "harness.json").read_bytes())
