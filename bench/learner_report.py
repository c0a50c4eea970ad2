"""What runs of ``bench.learner`` say together: means over seeds, paired intervals, a table."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from rich.table import Table

from bench.learner_methods import FULL


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


def summary(runs: dict[str, dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds by method, beside the base, and intervals against our learner.

    ``runs`` are named by method and seed: ``sdft/0``.
    """
    methods: dict[str, Any] = {}
    seeds = sorted({int(run.partition("/")[2]) for run in runs})
    there = {run.partition("/")[0] for run in runs}
    for method in (m for m in FULL if m in there):
        done = {seed: runs[f"{method}/{seed}"] for seed in seeds if f"{method}/{seed}" in runs}
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
        rival = {s: r for s, r in done.items() if f"sdft/{s}" in runs}
        if method != "sdft" and rival:
            methods[method]["sdft_other_precision"] = [
                s for s, r in rival.items() if precision_of(r) != precision_of(runs[f"sdft/{s}"])
            ]
            ours = [right for s in rival for right in runs[f"sdft/{s}"]["correct"][-1]]
            theirs = [right for r in rival.values() for right in r["correct"][-1]]
            interval = paired(ours, theirs, np.random.default_rng(0))
            methods[method]["sdft_lead_95"] = interval
            ours = [runs[f"sdft/{s}"]["human_correct"] for s in rival]
            theirs = [r["human_correct"] for r in rival.values()]
            if all(ours):
                interval = paired(ours, theirs, np.random.default_rng(0))
                methods[method]["sdft_human_lead_95"] = interval
                methods[method]["sdft_human_lead_by_seed"] = {
                    s: round(runs[f"sdft/{s}"]["human"] - r["human"], 4) for s, r in rival.items()
                }
            methods[method]["sdft_lead_by_seed"] = {
                s: round(runs[f"sdft/{s}"]["average"] - r["average"], 4) for s, r in rival.items()
            }
    return methods


def precision_of(run: dict[str, Any]) -> str:
    """What the stages of a run were multiplied in."""
    return ", ".join(sorted({stage["precision"] for stage in run["stages"]}))


def table(methods: dict[str, Any], base: dict[str, Any]) -> Table:
    """For people."""
    made = Table(
        "method", "average", "BWT", "base KL", "retention drop", "human", "sdft's lead", "in"
    )
    made.add_row("(base)", "", "", "0", "0", f"{base['human']:.3f}", "average; human", "")
    for name, m in methods.items():
        leads = [m[k] for k in ("sdft_lead_95", "sdft_human_lead_95") if k in m]
        seeds = ", ".join(map(str, m.get("sdft_other_precision", ())))
        other = f" (seed {seeds}: sdft in another precision)" if seeds else ""
        made.add_row(
            name,
            f"{m['average']:.3f}",
            f"{m['bwt']:+.3f}",
            f"{m['base_kl']:.4f}",
            f"{m['retention_drop']:+.4f}",
            f"{m['human']:.3f}",
            "; ".join(f"{low:+.3f} to {high:+.3f}" for low, high in leads) + other,
            ", ".join(sorted(set(m["precision"].values()))),
        )
    return made
