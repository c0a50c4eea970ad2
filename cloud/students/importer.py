"""``anabranch student import``: bring a model in once, check its export, keep it by content.

The folder holds ``bundle/`` (what devices run), ``masters/`` (fp32, what learners go on from) and
``import.json`` (what it was made of, and the check).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cloud.students import check, export, magpie
from edge.delta.files import fsync_folder
from edge.student.bundle import digest, sha256_file
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from protos.harness import Harness

VERSION = 5
ANSWERS, WRITTEN = "answers.json", "written.json"
"""In the masters' folder: the bundle's greedy answers to general prompts; requests and answers that
the masters wrote themselves (:mod:`cloud.students.magpie`)."""


@dataclass(frozen=True)
class Imported:
    """An imported student: its folders, digest, and how its file agrees with torch."""

    bundle: Path
    masters: Path
    digest: str
    check: check.Agreement


def bring_in(
    path: Path, harness: Harness, out: Path, progress: Callable[[str, float], None]
) -> Imported:
    """Import a GGUF file or a Hugging Face folder into ``out``; unchanged input is not redone.

    Raises:
        InvalidInputError: the source is not a model of the Llama family, or ``out`` is in use.
    """
    from cloud.students import source  # noqa: PLC0415  # seconds that who opens a student saves

    key = _key(path, harness)
    try:
        return _cached(out, key)
    except (IntegrityError, InvalidInputError, OSError, ValueError, KeyError):
        pass  # absent, broken or made of other input: made anew below
    if out.exists() and any(out.iterdir()) and not (out / "import.json").exists():
        msg = f"{out} holds other files: name an empty folder or an imported student"
        raise InvalidInputError(msg)
    progress("read the model", 0.0)
    brought = source.load(path)
    work = out.with_name(out.name + ".importing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    progress("quantize and export", 0.35)
    export.export(brought, harness, work / "bundle")
    progress("answer general prompts", 0.45)
    said = check.answers(work / "bundle")
    progress("check against torch", 0.6)
    agreement = check.compare(
        brought,
        work / "bundle",
        said,
        lambda part: progress("check against torch", 0.6 + 0.15 * part),
    )
    written = magpie.write(
        brought, seed=0, progress=lambda part: progress("write requests", 0.75 + 0.15 * part)
    )
    progress("keep fp32 masters", 0.9)
    brought.model.save_pretrained(work / "masters")
    (work / "masters" / ANSWERS).write_text(json.dumps(said, indent=1) + "\n")
    kept = [asdict(w) for w in written]
    (work / "masters" / WRITTEN).write_text(json.dumps(kept, indent=1) + "\n")
    note = {"version": VERSION, "key": key, "name": brought.name, "check": asdict(agreement)}
    note["digest"] = digest(work / "bundle")
    (work / "import.json").write_text(json.dumps(note, indent=1) + "\n")
    _sync(work)  # or a power loss might leave a whole folder of empty files
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    work.replace(out)
    fsync_folder(out.parent)
    return _cached(out, key)


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def open_imported(out: Path) -> Imported:
    """An imported student's folders.

    Raises:
        InvalidInputError: ``out`` was not made by ``anabranch student import``.
    """
    try:
        return _cached(out, None)
    except (OSError, ValueError, KeyError) as error:
        msg = f"{out} holds no imported student: run `anabranch student import --out {out}` first"
        raise InvalidInputError(msg) from error


def _cached(out: Path, key: str | None) -> Imported:
    note = json.loads((out / "import.json").read_text())
    if note["version"] != VERSION or (key is not None and note["key"] != key):
        msg = f"{out} was imported from other input or by another version: import it again"
        raise InvalidInputError(msg)
    if digest(out / "bundle") != note["digest"]:
        msg = f"{out / 'bundle'} has changed since it was imported"
        raise IntegrityError(msg)
    agreement = check.Agreement(**note["check"])
    return Imported(out / "bundle", out / "masters", note["digest"], agreement)


def _key(path: Path, harness: Harness) -> str:
    """What decides an import: the source's bytes, harness, prompts, and this module's version."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not files or not files[0].exists():
        msg = f"{path} is neither a GGUF file nor a Hugging Face folder"
        raise InvalidInputError(msg)
    parts = [str(VERSION).encode(), harness.to_json(), json.dumps(check.PROMPTS).encode()]
    parts += [f"{p.name} {sha256_file(p)}".encode() for p in files]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()
