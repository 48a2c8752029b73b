"""Pictures of routers: experts in use over time, which tasks are routed alike, how well their gradients agree."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from .plots import INK, MOST_LEGIBLE, finish, save

_MEAN, _FEWEST, _ENTROPY = "#0072b2", "#d55e00", "#009e73"


def plot_over_time(metrics: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Effective experts, the mean over routers and the router with fewest, and below them the entropy of a token.

    Args:
        metrics: log lines that have figures of routing.
    """
    steps = [line["step"] for line in metrics]
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for key, shade, label in (
        ("routing/effective_experts", _MEAN, "mean over routers"),
        ("routing/fewest_experts", _FEWEST, "router with fewest"),
    ):
        above.plot(steps, [line[key] for line in metrics], color=shade, linewidth=1.5, label=label)
    finish(above, "effective experts")
    above.set_ylim(bottom=0)
    above.legend(loc="lower right", frameon=False, fontsize=9)
    below.plot(steps, [line["routing/entropy"] for line in metrics], color=_ENTROPY, linewidth=1.5)
    finish(below, "entropy of a token's weights, nats (mean over routers)")
    below.set_ylim(0, 1.1 * max(line["routing/entropy"] for line in metrics) + 0.01)
    below.set_xlabel("step", fontsize=9)
    figure.suptitle(f"{title}: routing while it trained", x=0.01, ha="left", fontsize=12, color=INK)
    save(figure, path)


def plot_similarity(distances: np.ndarray, tasks: Sequence[str], path: Path, *, title: str) -> None:
    """A dendrogram of tasks by how differently they are routed.

    Args:
        distances: `(tasks, tasks)`, between 0 (the same experts) and 1 (none in common).
    """
    figure = Figure(figsize=(6.5, 0.32 * len(tasks) + 1.6), layout="constrained")
    axes = figure.subplots()
    merges = linkage(squareform(distances, checks=False), method="average")
    dendrogram(merges, labels=list(tasks), orientation="left", ax=axes, color_threshold=0, above_threshold_color=_MEAN)
    finish(axes, "")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.spines[["left", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=9, colors=INK)
    axes.set_xlim(left=max(1.05 * float(merges[:, 2].max()), 0.05), right=0)
    axes.set_xlabel("distance of expert usage (Jensen-Shannon, mean over routers)", fontsize=9)
    figure.suptitle(f"{title}: tasks by the experts they use", x=0.01, ha="left", fontsize=12, color=INK)
    save(figure, path)


def plot_cosines(entries: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """The cosines between tasks' gradients: their mean over time, and every pair over time.

    Args:
        entries: lines of the gradients file; pairs that no expert joins are null.
    """
    tasks = entries[-1]["tasks"]
    cosines = np.array([entry["cosine"] for entry in entries], dtype=float)  # (looks, tasks, tasks), null is NaN
    pairs = list(itertools.combinations(range(len(tasks)), 2))
    height = max(3.4, 0.15 * len(pairs) + 1.4)
    figure = Figure(figsize=(0.42 * len(tasks) + 9.0, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    scale: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "aspect": "auto", "interpolation": "nearest"}
    mean = _mean_over_time(cosines)
    left.imshow(mean, **scale)
    if len(tasks) <= MOST_LEGIBLE:
        _write_figures(left, mean)
    left.set_xticks(range(len(tasks)), tasks, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
    left.set_yticks(range(len(tasks)), tasks, fontsize=8)
    left.set_title("mean over time", loc="left", fontsize=10, color=INK)
    over_time = np.stack([cosines[:, one, other] for one, other in pairs])
    image = right.imshow(over_time, **scale)
    shown = range(len(pairs)) if len(pairs) <= 5 * MOST_LEGIBLE else []
    right.set_yticks(shown, [f"{tasks[one]}, {tasks[other]}" for one, other in pairs[: len(shown)]], fontsize=6)
    marks = sorted({0, len(entries) // 2, len(entries) - 1})
    right.set_xticks(marks, [str(entries[mark]["step"]) for mark in marks], fontsize=8)
    right.set_xlabel("step", fontsize=9)
    right.set_title("each pair over time (white: no expert is shared)", loc="left", fontsize=10, color=INK)
    for axes in (left, right):
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=[left, right], shrink=0.7, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    figure.suptitle(f"{title}: cosine between tasks' gradients", x=0.01, ha="left", fontsize=12, color=INK)
    save(figure, path)


def _mean_over_time(cosines: np.ndarray) -> np.ndarray:
    """The mean of what there is; NaN where there never was any."""
    known = ~np.isnan(cosines)
    return np.where(known.any(0), np.nansum(cosines, 0) / np.maximum(known.sum(0), 1), np.nan)


def _write_figures(axes: Axes, cosines: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(cosines):
        if row != column and not np.isnan(value):
            shade = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
