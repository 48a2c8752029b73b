"""Pictures of runs: bars per task, loss curves, who uses which expert. Colours are safe for colour-blind readers."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .report import COLUMNS, Results

# Okabe & Ito (2008). What is compared with is grey and black, methods have colours of their own.
_FIXED = {
    "base": "#b8b8b8",
    "lora": "#4d4d4d",
    "auto": "#0072b2",
    "named": "#56b4e9",
    "exported": "#e69f00",
    "adapted": "#0072b2",
    "moa": "#0072b2",
    "smora": "#d55e00",
    "multilora": "#009e73",
    "molora": "#cc79a7",
    "hydralora": "#e69f00",
}
_SPARE = ("#56b4e9", "#8c6d00", "#7b52ab", "#00767a", "#a8324a")
INK = "#333333"
MOST_LEGIBLE = 12
Curves = Mapping[str, Sequence[Mapping[str, Any]]]


def colour(name: str) -> str:
    """The colour of a column or method, the same in every picture."""
    if name in _FIXED:
        return _FIXED[name]
    if name.startswith("lora"):
        return _FIXED["lora"]
    return _SPARE[sum(name.encode()) % len(_SPARE)]


def plot_scores(results: Results, path: Path) -> None:
    """Bars per task: base, matched LoRA, the method, its exports."""
    values = {column: [results.value(column, task) or 0.0 for task in results.tasks] for column in results.columns}
    labels = {column: COLUMNS[column] for column in values}
    means = {column: results.mean(column) or 0.0 for column in values}
    plot_bars([task.name for task in results.tasks], values, path, labels=labels, title=results.title, means=means)


def plot_bars(
    tasks: Sequence[str],
    values: Mapping[str, Sequence[float]],
    path: Path,
    *,
    labels: Mapping[str, str],
    title: str,
    means: Mapping[str, float],
    spread: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Grouped bars, tasks side by side and the mean over tasks set apart.

    Args:
        values: per series the score of every task, 0..1.
        labels: how a series is called in the legend; its key picks the colour.
        spread: per series the standard deviation of every task, drawn as whiskers.
    """
    figure = Figure(figsize=(max(7.0, 1.15 * (len(tasks) + 2) + 1.5), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(values)
    places = np.array([*range(len(tasks)), len(tasks) + 0.5])
    for number, (series, scores) in enumerate(values.items()):
        offset = (number - (len(values) - 1) / 2) * width
        heights = 100 * np.array([*scores, means[series]])
        axes.bar(places + offset, heights, 0.92 * width, color=colour(series), label=labels[series], zorder=2)
        if spread is not None:
            whiskers = 100 * np.array(spread[series])
            axes.errorbar(
                places[:-1] + offset,
                heights[:-1],
                whiskers,
                fmt="none",
                ecolor=INK,
                elinewidth=0.9,
                capsize=2,
                zorder=3,
            )
    axes.axvline(len(tasks) - 0.25, color="#cccccc", linewidth=1)
    axes.set_xticks(places, [*tasks, "mean"], rotation=30 if len(tasks) > MOST_LEGIBLE else 0)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]), top=max(100, axes.get_ylim()[1]))
    axes.set_ylabel("main metric, %")
    finish(axes, title)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(values), frameon=False, fontsize=9, borderpad=0)
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=26)
    save(figure, path)


def plot_curves(curves: Curves, tasks: Sequence[str], path: Path, *, title: str) -> None:
    """The training loss of every task, one small picture per task and one line per method.

    Args:
        curves: per method the lines of its metrics file.
    """
    rows, columns = _grid_for(len(tasks) + 1)
    figure = Figure(figsize=(3.1 * columns, 2.3 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    keys = {"all tasks": "train/loss", **{task: f"train/loss/{task}" for task in tasks}}
    for axes, (name, key) in zip(grid, keys.items(), strict=False):
        for method, entries in curves.items():
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour(method), linewidth=1.5, label=method)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="both", labelsize=8)
        finish(axes, name)
    for axes in grid[len(keys) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(keys) - columns) : len(keys)]:
        axes.set_xlabel("step", fontsize=9)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=max(1, len(labels)), frameon=False, fontsize=9)
    figure.suptitle(f"{title}: training loss, nats per answer token", x=0.01, ha="left", fontsize=12, color=INK)
    save(figure, path)


def plot_usage(usage: Mapping[str, Any], folder: Path, *, title: str) -> list[Path]:
    """Draw who uses which expert.

    One router for the whole model gives one task x expert heatmap. Routers at every linear give an overview of how many
    experts each one keeps busy, and one picture per decoder layer with the task x expert heatmaps of its linears.

    Args:
        usage: what `usage_data` gives.

    Returns:
        The pictures, the overview first.
    """
    layers: dict[str, Any] = usage["layers"]
    groups: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        block, module = place_of(name)
        groups.setdefault(block, {})[module] = layer
    overview = folder / "routing.png"
    if len(groups) == len(layers):
        maps = {block: np.array(layer["usage"]) for block, modules in groups.items() for layer in modules.values()}
        _plot_heatmaps(maps, usage, overview, title=f"{title}: share of each expert, by task")
        return [overview]
    _plot_effective_experts(groups, overview, title=title)
    pictures = [overview]
    for block, modules in groups.items():
        pictures.append(folder / "routing" / f"{block.replace(' ', '-')}.png")
        maps = {module: np.array(layer["usage"]) for module, layer in modules.items()}
        _plot_heatmaps(maps, usage, pictures[-1], title=f"{title}, {block}: share of each expert, by task")
    return pictures


def _plot_effective_experts(groups: Mapping[str, Mapping[str, Any]], path: Path, *, title: str) -> None:
    modules = list(dict.fromkeys(module for members in groups.values() for module in members))
    busy = np.full((len(groups), len(modules)), np.nan)
    for row, members in enumerate(groups.values()):
        for module, layer in members.items():
            busy[row, modules.index(module)] = layer["effective_experts"]
    most = max(len(layer["usage"][0]) for members in groups.values() for layer in members.values())
    figure = Figure(figsize=(0.95 * len(modules) + 1.8, 0.42 * len(groups) + 1.9), layout="constrained")
    axes = figure.subplots()
    axes.imshow(busy, cmap="cividis", vmin=1, vmax=most, aspect="auto")
    for (row, column), count in np.ndenumerate(busy):
        if not np.isnan(count):
            shade = "black" if count > 0.55 * most else "white"
            axes.text(column, row, f"{count:.1f}", ha="center", va="center", fontsize=8, color=shade)
    axes.set_xticks(range(len(modules)), modules, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(f"{title}: effective experts of {most}, by router", x=0.01, ha="left", fontsize=12, color=INK)
    save(figure, path)


def _plot_heatmaps(maps: Mapping[str, np.ndarray], usage: Mapping[str, Any], path: Path, *, title: str) -> None:
    tasks, names = usage["tasks"], usage.get("experts", usage["tasks"])
    experts = max(shares.shape[1] for shares in maps.values())
    columns = 1 if len(maps) == 1 else 2 if experts > 16 else min(4, len(maps))
    rows = math.ceil(len(maps) / columns)
    wide = max(1.8 if len(maps) > 1 else 3.2, min(0.28 * experts, 5.5))
    size = (columns * wide + 2.2, rows * (0.24 * len(tasks) + 0.75) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    top = max(float(shares.max()) for shares in maps.values())
    for axes, (name, shares) in zip(grid.flatten(), maps.items(), strict=False):
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axes.set_title(name, loc="left", fontsize=9, color=INK)
        axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
        _label_experts(axes, shares, names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for axes in grid.flatten()[len(maps) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=grid, shrink=0.7, pad=0.02, format=lambda share, _: f"{100 * share:.0f} %")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    save(figure, path)


def _label_experts(axes: Axes, shares: np.ndarray, names: Sequence[str] | None) -> None:
    """Experts by name where they have names, else by number; figures where they fit."""
    experts = shares.shape[1]
    if names is not None and experts == len(names) <= MOST_LEGIBLE:
        axes.set_xticks(range(experts), names, fontsize=8, rotation=45, ha="right", rotation_mode="anchor")
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                shade = "black" if share > 0.5 * shares.max() else "white"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=shade)
    else:
        step = 1 if experts <= MOST_LEGIBLE else 8
        axes.set_xticks(range(0, experts, step), [str(i + 1) for i in range(0, experts, step)], fontsize=8)


def place_of(name: str) -> tuple[str, str]:
    """The decoder layer and the linear: `model.layers.3.mlp.up_proj` is `mlp.up_proj` of `layer 3`."""
    match = re.search(r"\.(\d+)\.(.+)$", name)
    return (f"layer {match[1]}", match[2]) if match else (name, name)


def _grid_for(pictures: int) -> tuple[int, int]:
    """Rows and columns that leave the fewest places empty."""
    columns = min((5, 4, 3), key=lambda n: (-pictures % n, abs(n - 4))) if pictures > 3 else pictures
    return math.ceil(pictures / columns), columns


def finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=INK, length=0)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
