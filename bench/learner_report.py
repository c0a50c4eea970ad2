"""What runs of ``bench.learner`` say together: means over seeds, paired intervals, tables.

``python -m bench.learner_report [FILE ...] [--methods ...] [--against METHOD]`` prints the tables
of docs/learning.md, in Markdown, from files of results that were measured with the same options.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from bench.learner_methods import FULL

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path("bench/results/learner_full.json")
"""Kept in the tree: it takes many hours, and goes on where it was."""


def paired(one: list[str], other: list[str], rng: np.random.Generator) -> tuple[float, float]:
    """95% bootstrap interval of the mean of ``one`` minus ``other``, request by request, 0..1.

    Each string holds the outcomes of one skill with one seed; skills weigh alike.
    """
    pairs = [
        np.array([int(a) - int(b) for a, b in zip(x, y, strict=True)])
        for x, y in zip(one, other, strict=True)
    ]
    draws = [
        np.mean([p[rng.integers(0, len(p), len(p))].mean() for p in pairs]) for _ in range(2000)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return round(float(low), 4), round(float(high), 4)


@dataclass(frozen=True)
class Lead:
    """How much more one method gets right than another, by the seeds that both have (-1..1).

    Intervals are paired, 95%, over requests. ``other_precision`` are seeds whose two runs were
    multiplied in different ones.
    """

    by_seed: dict[int, float]
    interval: tuple[float, float]
    human_by_seed: dict[int, float]
    human_interval: tuple[float, float] | None
    other_precision: list[int]

    @classmethod
    def of(cls, ours: dict[int, Any], theirs: dict[int, Any]) -> Lead:
        """Compare runs by seed; at least one seed is in both."""
        pairs = {s: (ours[s], theirs[s]) for s in ours if s in theirs}
        mine = [right for one, _ in pairs.values() for right in one["correct"][-1]]
        other = [right for _, two in pairs.values() for right in two["correct"][-1]]
        said = [one["human_correct"] for one, _ in pairs.values()]
        theirs_said = [two["human_correct"] for _, two in pairs.values()]
        return cls(
            by_seed=_by_seed(pairs, "average"),
            interval=paired(mine, other, np.random.default_rng(0)),
            human_by_seed=_by_seed(pairs, "human"),
            human_interval=paired(said, theirs_said, np.random.default_rng(0))
            if all(said) and all(theirs_said)
            else None,
            other_precision=[
                s for s, (one, two) in pairs.items() if precision_of(one) != precision_of(two)
            ],
        )


def _by_seed(pairs: dict[int, tuple[Any, Any]], key: str) -> dict[int, float]:
    return {s: round(one[key] - other[key], 4) for s, (one, other) in pairs.items()}


def summary(runs: dict[str, dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds by method, beside the base, and intervals against our learner.

    ``runs`` are named by method and seed: ``sdft/0``.
    """
    methods: dict[str, Any] = {}
    there = {run.partition("/")[0] for run in runs}
    for method in (m for m in FULL if m in there):
        done = runs_of(runs, method)
        mean = {
            key: round(statistics.fmean(r[key] for r in done.values()), 5)
            for key in ("average", "bwt", "base_kl", "human")
        }
        drops = [base["retention"]["mean"] - r["retention"]["mean"] for r in done.values()]
        mean["retention_drop"] = round(statistics.fmean(drops), 4)
        first = next(iter(done.values()))
        learnt_by = sorted({s["method"] for r in done.values() for s in r["stages"]})
        methods[method] = {
            **mean,
            "matrix": first["matrix"],
            "seeds": list(done),
            "precision": {seed: precision_of(run) for seed, run in done.items()},
            "learnt_by": learnt_by,  # sdft falls back to sft where its teacher is no better
        }
        ours = runs_of(runs, "sdft")
        if method != "sdft" and ours.keys() & done.keys():
            lead = Lead.of(ours, done)
            methods[method] |= {
                "sdft_other_precision": lead.other_precision,
                "sdft_lead_95": lead.interval,
                "sdft_lead_by_seed": lead.by_seed,
            }
            if lead.human_interval:
                methods[method]["sdft_human_lead_95"] = lead.human_interval
                methods[method]["sdft_human_lead_by_seed"] = lead.human_by_seed
    return methods


def precision_of(run: dict[str, Any]) -> str:
    """What the stages of a run were multiplied in."""
    return ", ".join(sorted({stage["precision"] for stage in run["stages"]}))


def table(methods: dict[str, Any], base: dict[str, Any]) -> Table:
    """For people, at a terminal of 80 columns."""
    notes = ["SDFT's lead, 95%, in points: on the tests, and on people's words"]
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    made.add_column("method", no_wrap=True)
    for name in ("average", "BWT", "base\nKL", "retained", "people", "SDFT leads"):
        made.add_column(name, justify="right", no_wrap=True)
    made.add_column("in")
    made.add_row("(base)", "", "", "0", "0", f"{base['human']:.3f}", "", "")
    for name, m in methods.items():
        leads = [m[k] for k in ("sdft_lead_95", "sdft_human_lead_95") if k in m]
        if seeds := ", ".join(map(str, m.get("sdft_other_precision", ()))):
            notes.append(f"{name}: seed {seeds}: sdft in another precision")
        made.add_row(
            name,
            f"{m['average']:.3f}",
            f"{m['bwt']:+.3f}",
            f"{m['base_kl']:.3f}",
            f"{-m['retention_drop']:+.3f}",
            f"{m['human']:.3f}",
            "\n".join(f"{100 * low:+.1f}, {100 * high:+.1f}" for low, high in leads),
            "\n".join(sorted(set(m["precision"].values()))),
        )
    made.caption = "\n".join(notes)
    return made


def markdown(
    runs: dict[str, dict[str, Any]],
    base: dict[str, Any],
    methods: Sequence[str],
    against: str,
    *,
    means: bool = False,
) -> str:
    """The base, runs one by one and their means (or ``means`` alone); how far ``against`` leads."""
    by_method = {method: runs_of(runs, method) for method in methods}
    lines = [
        "| | average | BWT | base KL | retention | people | last row |",
        "|---|---|---|---|---|---|---|",
        f"| as imported | | | 0 | 0 | {base['human']:.3f} | |",
    ]
    for method, done in by_method.items():
        for seed, run in done.items() if not means or len(done) == 1 else ():
            precision = "" if precision_of(run) == "bf16" else f" ({precision_of(run)})"
            lines.append(_row(f"`{method}`, seed {seed}{precision}", [run], base))
        if len(done) > 1:
            lines.append(_row(f"`{method}`, mean of {len(done)}", list(done.values()), base))
    figures = "mean, its standard error | over requests, 95%"
    lines += [
        "",
        f"| points by which `{against}` leads | tests | {figures} | people | {figures} |",
        "|---|---|---|---|---|---|---|",
    ]
    ours = runs_of(runs, against)
    for method, done in by_method.items():
        if method == against or not ours.keys() & done.keys():
            continue
        lead = Lead.of(ours, done)
        mixed = ", ".join(map(str, lead.other_precision))
        other = f" (seed {mixed}: between two precisions)" if mixed else ""
        cells = [
            *_points(lead.by_seed, lead.interval),
            *_points(lead.human_by_seed, lead.human_interval),
        ]
        lines.append(f"| `{method}`{other} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs_of(runs: dict[str, dict[str, Any]], method: str) -> dict[int, dict[str, Any]]:
    """A method's runs by seed, of runs that are named by method and seed."""
    seeds = sorted(int(s) for m, _, s in (run.partition("/") for run in runs) if m == method)
    return {seed: runs[f"{method}/{seed}"] for seed in seeds}


def _row(name: str, runs: list[dict[str, Any]], base: dict[str, Any]) -> str:
    def mean(key: str) -> float:
        return statistics.fmean(run[key] for run in runs)

    kept = statistics.fmean(r["retention"]["mean"] for r in runs) - base["retention"]["mean"]
    last = np.mean([r["matrix"][-1] for r in runs], axis=0)
    cells = [
        f"{mean('average'):.3f}",
        f"{mean('bwt'):+.3f}",
        f"{mean('base_kl'):.3f}",
        f"{round(kept, 3) or 0:+.3f}",
        f"{mean('human'):.3f}",
        ", ".join(f"{share:.2f}" for share in last),
    ]
    return f"| {name} | {' | '.join(cells)} |".replace("-", "\N{MINUS SIGN}")


def _points(by_seed: dict[int, float], interval: tuple[float, float] | None) -> list[str]:
    values = [100 * v for v in by_seed.values()]
    mean = f"{statistics.fmean(values):+.1f}"
    if len(values) > 1:
        mean += f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"
    span = "" if interval is None else f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"
    cells = [", ".join(f"{v:+.1f}" for v in values), mean, span]
    return [cell.replace("-", "\N{MINUS SIGN}") for cell in cells]


def changed_options(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Options of results, or of what is to be measured, that have another value in ``other``."""
    parts = ("plan", "sdft")
    return [n for part in parts for n, v in one[part].items() if other[part].get(n) != v]


def differing(kept: Sequence[dict[str, Any]]) -> list[str]:
    """Options in which files of results differ: runs of them say nothing together."""
    return sorted({n for one, other in permutations(kept, 2) for n in changed_options(one, other)})


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        default=[RESULTS],
        help="the base is the first's; of a run that several have, the last counts"
        f" (default: {RESULTS})",
    )
    parser.add_argument("--methods", nargs="+", choices=FULL, default=FULL)
    parser.add_argument("--means", action="store_true", help="no seed by itself if there are more")
    parser.add_argument("--against", choices=FULL, default="sdft", help="default: %(default)s")
    options = parser.parse_args()
    try:
        kept = [json.loads(file.read_text()) for file in options.files]
        if other := differing(kept):
            parser.error(f"the files were measured with other {', '.join(other)}: give one alone")
        runs = {name: run for each in kept for name, run in each["runs"].items()}
        base = kept[0]["base"]
        print(markdown(runs, base, options.methods, options.against, means=options.means))
    except (OSError, ValueError, KeyError) as error:
        named = ", ".join(map(str, options.files))
        parser.error(f"{named}: no files of results of bench.learner: {error!r}")


if __name__ == "__main__":
    main()
