"""The files that learnt weights may become, the smallest update first.

An update by **products** is a fraction of the bytes of changed codes (:mod:`.low_rank`), and only
nearly what was learnt. What it leaves out is left out for good: the next job learns on from the
weights that devices have. An update by **codes** rounds every weight to nearest.

The dither of each product is noise on the codes, and adds up from release to release; nothing else
tells the cloud's weights and the devices' codes apart. Past :data:`MOST_NOISE` codes are sent,
which takes all of it away.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from safetensors.torch import load_file

from cloud.students import low_rank, quantize
from cloud.students.export import given, read_tensor, stacked, tensors_of, write_back
from edge import delta
from edge.student.bundle import WEIGHTS, read_config, read_harness
from protos.errors import IntegrityError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    State = Mapping[str, torch.Tensor]

log = logging.getLogger("anabranch.students")

DELTA_SHARE = 1 / 60
"""Bytes that an update by products may take, of those of the weights: 2.4 MB of 144."""
MOST_NOISE = 0.75
"""Root mean square of how far codes may lie from their weights, in steps; rounding is 0.29."""

_GOLDEN = 40503


@dataclass(frozen=True)
class Work:
    """What a candidate is made of.

    Attributes:
        masters: folder of the imported fp32 model.
        before: parameters that differ from it in the release in service, by torch name.
        learnt: the same of what was learnt; it holds every name that ``before`` holds.
        base: the bundle first imported, which has the scales.
        current: the bundle in service, whose codes stand for ``before``.
        release: its number; each has another dither.
    """

    masters: Path
    before: State
    learnt: State
    base: Path
    current: Path
    release: int = 0


@dataclass(frozen=True)
class Candidate:
    """A bundle that was written.

    Attributes:
        way: ``products`` or ``codes``.
        parameters: that its codes stand for, fp32 by torch name: learning goes on from them.
        changed: codes that differ from the base's.
        noise: how far codes lie from their parameters, in steps (root mean square).
        delta_bytes: of the update of the weights in service.
        updates: products that turn the codes in service into these; none by ``codes``.
    """

    way: str
    parameters: dict[str, torch.Tensor]
    changed: int
    noise: float
    delta_bytes: int
    updates: Sequence[delta.Update] = field(default=(), repr=False)


def candidates(work: Work, out: Path, *, share: float = DELTA_SHARE) -> Iterator[Candidate]:
    """Write candidates to the folder ``out``, each in place of the one before: products, codes.

    Products are left out where ``share`` is 0, where they would save no bytes, where the model is
    too large for them, or where noise is past its bound.
    """
    remove_leftovers(out)
    aside = out.with_name(out.name + ".codes")
    try:
        codes = _by_codes(work, aside)
        products = _by_products(work, out, share) if share else None
        if products is not None and products.delta_bytes < codes.delta_bytes:
            yield products
        shutil.rmtree(out, ignore_errors=True)
        aside.replace(out)
        yield codes
    finally:
        remove_leftovers(out)


def remove_leftovers(out: Path) -> None:
    """Remove what writing candidates to ``out`` left beside it when it was killed, or failed."""
    for path in out.parent.glob(f"{out.name}.*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _by_codes(work: Work, out: Path) -> Candidate:
    changed = write_back(work.base, work.learnt, read_harness(work.current), out)
    size = delta_bytes(work.current, out)
    return Candidate("codes", dict(work.learnt), changed, noise(out, work.learnt), size)


def _by_products(work: Work, out: Path, share: float) -> Candidate | None:
    budget = round(share * (work.current / WEIGHTS).stat().st_size)
    before = load_file(work.masters / "model.safetensors") | dict(work.before)
    try:
        updates = low_rank.products(
            work.current, before, work.learnt, budget=budget, phase=_phase(work.release)
        )
        if not updates:
            return None
        parameters = low_rank.reached(work.current, before, work.learnt, updates)
        low_rank.write_products(work.current, updates, parameters, read_harness(work.current), out)
    except (InvalidInputError, IntegrityError, OverflowError) as error:
        # A matrix that is too large, or scales that are next to nothing.
        log.warning("every changed code is sent: %s", error)
        return None
    found = noise(out, parameters)
    if found > MOST_NOISE:
        log.info("every changed code is sent: codes would be off by %.2f steps", found)
        return None
    changed, size = _changed(work.base, out), delta_bytes(work.current, out, updates)
    return Candidate("products", parameters, changed, found, size, tuple(updates))


def _phase(release: int) -> int:
    """Of the dither: in steps of the golden ratio those of a few releases lie far apart."""
    return release * _GOLDEN % (1 << 16)


def noise(bundle: Path, parameters: State) -> float:
    """How far a bundle's codes lie from what they stand for: root mean square, in steps.

    Only tensors count whose every source is in ``parameters``. Codes at the end of their range are
    left out: there is no nearer one.
    """
    layout, total, count = tensors_of(bundle), 0.0, 0
    for tensor in given(layout, parameters):
        if tensor.dtype != "uint8":
            continue
        scales = read_tensor(bundle, layout[f"{tensor.name}.scales"])
        codes = read_tensor(bundle, tensor)
        steps = quantize.in_steps(stacked(tensor, parameters), scales)
        off = steps - (codes.astype(np.float32) - quantize.ZERO)
        inner = (codes > 1) & (codes < np.iinfo(np.uint8).max)
        total += float(np.square(off[inner], dtype=np.float64).sum())
        count += int(inner.sum())
    return float(np.sqrt(total / count)) if count else 0.0


def _changed(base: Path, bundle: Path) -> int:
    """Codes that differ between two bundles of one layout."""
    kinds = (t for t in tensors_of(base).values() if t.dtype == "uint8")
    return sum(int((read_tensor(base, t) != read_tensor(bundle, t)).sum()) for t in kinds)


def delta_bytes(current: Path, bundle: Path, updates: Sequence[delta.Update] = ()) -> int:
    """Size of the delta that a release of ``bundle`` after ``current`` is."""
    files = current / WEIGHTS, bundle / WEIGHTS
    made = bundle.with_name(bundle.name + ".delta")
    try:
        tensors = delta.tensors_in(read_config(current))
        return delta.encode(*files, made, tensors=tensors, updates=updates).size
    finally:
        made.unlink(missing_ok=True)
