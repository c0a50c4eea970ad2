"""The demo's picture: how often the fleet was right over time, and what happened meanwhile."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")  # no display; must come before pyplot

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from cloud.demo.record import Event, Record

_WINDOW = 30
_LEAST = 10
_LULL_S = 20.0
_COLORS = ("#1f6fb4", "#d1731a")
_MEASURES = {"before": "s", "memory": "D", "after": "o"}


def rolling(asks: list[Event]) -> tuple[list[float], list[float]]:
    """Minutes, and the share of right answers among the latest 30 commands at each.

    After a lull it begins anew, with a gap (not a number) before: the student may be another.

    >>> asks = [{"t": 6.0 * i, "right": i > 4} for i in range(12)]
    >>> rolling(asks)
    ([0.9, 1.0, 1.1], [0.5, 0.545, 0.583])
    """
    window: deque[bool] = deque(maxlen=_WINDOW)
    minutes, shares = [], []
    last = 0.0
    for ask in asks:
        if ask["t"] - last > _LULL_S and window:
            window.clear()
            minutes.append(ask["t"] / 60)
            shares.append(math.nan)
        last = ask["t"]
        window.append(bool(ask["right"]))
        if len(window) >= _LEAST:
            minutes.append(ask["t"] / 60)
            shares.append(round(sum(window) / len(window), 3))
    return minutes, shares


def draw(record: Record, skills: tuple[str, str], file: Path) -> None:
    """Write the picture as a PNG.

    Args:
        record: what happened.
        skills: the first and the second.
        file: to write.
    """
    figure, axes = plt.subplots(figsize=(11, 5.2), layout="constrained")
    for skill, color in zip(skills, _COLORS, strict=True):
        _accuracy(axes, record, skill, color)
    _jobs(axes, record)
    for number, event in enumerate(record.of("phase")):
        axes.axvline(event["t"] / 60, color="#bbbbbb", linewidth=0.8, zorder=0)
        height = 1.09 if number % 2 else 1.13  # short phases stand close to one another
        axes.text(event["t"] / 60, height, f" {event['name']}", color="#666666", fontsize=9)
    _marks(axes, [e["t"] for e in record.of("alarm")], "v", "#c02020", "drift alarm", 1.03)
    _marks(axes, [e["t"] for e in record.of("release")], "*", "#7030a0", "release", 0.99)
    _marks(
        axes, [e["t"] for e in record.of("swap") if e["release"] > 1], "^", "#208040", "swap", 1.03
    )
    axes.set_ylim(-0.03, 1.18)
    axes.set_xlim(left=0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("answered to the letter")
    axes.set_title(
        f"Three devices with a 135M student: share of right answers, latest {_WINDOW} commands"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _accuracy(axes: Axes, record: Record, skill: str, color: str) -> None:
    """A line for people's commands, broken where nobody asked, and marks for the measures."""
    asks = list(record.of("ask", skill=skill))
    label: str | None = f"{skill}: people's commands"
    for phase in record.of("phase"):
        minutes, shares = rolling([a for a in asks if a["phase"] == phase["name"]])
        if minutes:
            axes.plot(minutes, shares, color=color, linewidth=1.6, label=label)
            label = None
    for measure in record.of("measure", skill=skill):
        when = measure["name"].rpartition("_")[2]
        axes.plot(
            [measure["t"] / 60],
            [measure["right"] / measure["count"]],
            _MEASURES[when],
            color=color,
            markersize=9,
            markeredgecolor="black",
            label=f"{skill}: {measure['count']} unseen, {when}",
        )


def _jobs(axes: Axes, record: Record) -> None:
    label: str | None = "adaptation (learning, gate)"
    for began in record.of("job", state="learning"):
        for ended in record.of("job", state="done", name=began["name"]):
            span = (began["t"] / 60, ended["t"] / 60)
            axes.axvspan(*span, color="#eeeeee", zorder=-1, label=label)
            label = None


def _marks(
    axes: Axes, times: list[float], marker: str, color: str, label: str, height: float
) -> None:
    if times:
        at = [t / 60 for t in times]
        axes.plot(at, [height] * len(at), marker, color=color, label=label, markersize=8)
