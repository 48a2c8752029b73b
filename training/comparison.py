"""The outcome of a comparison: one table over methods, seeds and tasks, its data and its pictures."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..support.console import show_table
from ..support.errors import RunError
from ..support.files import write_text
from .assess import ROUTING, read_results
from .plots import plot_bars, plot_curves, plot_usage
from .report import COLUMNS, MISSING, Results, TaskInfo, describe_split, gain, markdown_table, percent
from .run_folder import RunFolder

COMPARISON, COMPARISON_TABLE = "comparison.json", "comparison.md"
FORMAT = 1


@dataclass(frozen=True)
class Contender:
    """A method with its options.

    Attributes:
        label: how tables call it.
        matched_rank: the rank of the plain LoRA of nearest size.
        matched: that LoRA's label; None where the contender is a plain LoRA itself.
    """

    label: str
    method: str
    options: dict[str, Any]
    parameters: int
    matched_rank: int
    matched: str | None


@dataclass(frozen=True)
class Chosen:
    """A contender at its learning rate.

    Attributes:
        tried: mean validation metric of every learning rate that was tried.
        runs: run folder by seed, relative to the comparison.
    """

    contender: Contender
    learning_rate: float
    tried: dict[float, float]
    runs: dict[int, str]

    @property
    def label(self) -> str:
        return self.contender.label


@dataclass(frozen=True)
class Comparison:
    """All contenders and the results of all their runs, by label and seed."""

    chosen: list[Chosen]
    results: dict[str, list[Results]]

    @classmethod
    def read(cls, folder: Path, chosen: list[Chosen]) -> "Comparison":
        """Collect the results of the chosen runs.

        Raises:
            RunError: when a run has none.
        """
        found = {entry.label: [read_results(folder / path) for path in entry.runs.values()] for entry in chosen}
        return cls(chosen, found)

    @classmethod
    def load(cls, folder: Path) -> "Comparison":
        """Read a comparison back from its folder.

        Raises:
            RunError: when `folder` holds none, or a file is not readable.
        """
        path = folder / COMPARISON
        if not path.is_file():
            raise RunError(f"{folder}: no {COMPARISON} there; run `loramux compare ... --to {folder}` first")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            chosen = [
                Chosen(
                    Contender(**entry["contender"]),
                    entry["learning_rate"],
                    {float(rate): score for rate, score in entry["tried"].items()},
                    {int(seed): run for seed, run in entry["runs"].items()},
                )
                for entry in data["chosen"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: not a comparison ({error}); run it again") from None
        return cls.read(folder, chosen)

    @property
    def any_results(self) -> Results:
        return self.results[self.chosen[0].label][0]

    @property
    def tasks(self) -> list[TaskInfo]:
        return self.any_results.tasks

    def means(self, label: str, column: str | None = None) -> list[float]:
        """Per seed the mean over tasks, of a column or of the method at its best use."""
        return _known(results.mean(_column(results, column)) for results in self._with(label, column))

    def worsts(self, label: str) -> list[float]:
        return _known(results.worst(_column(results, None)) for results in self.results[label])

    def of_task(self, label: str, task: TaskInfo) -> list[float]:
        """Per seed the score of a task."""
        return _known(results.value(_column(results, None), task) for results in self.results[label])

    def to_data(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "chosen": [asdict(entry) for entry in self.chosen],
            "tasks": [asdict(task) for task in self.tasks],
            "table": {
                entry.label: {
                    "parameters": entry.contender.parameters,
                    "learning_rate": entry.learning_rate,
                    "mean": self.means(entry.label),
                    "worst": self.worsts(entry.label),
                    "router_decides": self.means(entry.label, "auto"),
                    "exported": self.means(entry.label, "exported"),
                    "tasks": {task.name: self.of_task(entry.label, task) for task in self.tasks},
                }
                for entry in self.chosen
            },
            "base": self.any_results.scores.get("base", {}),
        }

    def _with(self, label: str, column: str | None) -> list[Results]:
        return [results for results in self.results[label] if column is None or column in results.scores]


def summary_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """One row per contender, the base first; scores in per cent, over seeds as mean +- standard deviation."""
    base = comparison.any_results
    columns = {"auto": COLUMNS["auto"], "exported": COLUMNS["exported"]}
    shown = [key for key in columns if any(comparison.means(entry.label, key) for entry in comparison.chosen)]
    head = ["method", "parameters", "rate", "mean", "worst task", "vs matched LoRA", *(columns[key] for key in shown)]
    lines = []
    if "base" in base.scores:
        blank = [MISSING] * (1 + len(shown))
        lines.append(["base", "0", MISSING, percent(base.mean("base")), percent(base.worst("base")), *blank])
    for entry in comparison.chosen:
        label, contender = entry.label, entry.contender
        own, other = comparison.means(label), comparison.means(contender.matched) if contender.matched else []
        difference = gain(_average(own), _average(other)) if other else MISSING
        matched = f" ({contender.matched})" if other else ""
        lines.append(
            [
                label,
                f"{contender.parameters:,}",
                f"{entry.learning_rate:g}",
                spread(own),
                spread(comparison.worsts(label)),
                difference + matched,
                *(spread(comparison.means(label, key)) for key in shown),
            ]
        )
    return head, lines


def task_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """One row per task, one column per contender."""
    base = comparison.any_results
    head = ["task", "metric", *(["base"] if "base" in base.scores else []), *(e.label for e in comparison.chosen)]
    lines = []
    for task in comparison.tasks:
        scores = [spread(comparison.of_task(entry.label, task)) for entry in comparison.chosen]
        alone = [percent(base.value("base", task))] if "base" in base.scores else []
        lines.append([task.name, task.metric, *alone, *scores])
    return head, lines


def to_markdown(comparison: Comparison) -> str:
    facts = comparison.any_results.run
    seeds = sorted({seed for entry in comparison.chosen for seed in entry.runs})
    split = describe_split(comparison.any_results)
    intro = (
        f"Base `{facts['base']}`, {facts['steps']} steps of {facts['batch_size']}, {split}, "
        f"seeds {', '.join(map(str, seeds))}. Main metric per task in per cent, mean +- standard deviation over seeds. "
        "A method routed by task is told the task; `router decides` is its score when it is not."
    )
    parts = ["# Comparison", intro, markdown_table(*summary_table(comparison))]
    parts += ["## By task", markdown_table(*task_table(comparison))]
    if any(len(entry.tried) > 1 for entry in comparison.chosen):
        parts += ["## Learning rates", _RATES_NOTE, markdown_table(*_rates_table(comparison))]
    options = [f"- {e.label}: {json.dumps(comparison.results[e.label][0].run['options'])}" for e in comparison.chosen]
    parts += ["## Options", "\n".join(options)]
    return "\n\n".join(parts) + "\n"


def show_comparison(comparison: Comparison) -> None:
    """Print the summary."""
    show_table("main metric in per cent, mean +- standard deviation over seeds", *summary_table(comparison))


def draw_comparison(folder: Path) -> list[Path]:
    """Make the Markdown table and all pictures of a comparison anew from its run folders."""
    comparison = Comparison.load(folder)
    write_text(folder / COMPARISON_TABLE, to_markdown(comparison))
    pictures = [folder / "scores.png"]
    _draw_scores(comparison, pictures[0])
    first = {entry.label: folder / next(iter(entry.runs.values())) for entry in comparison.chosen}
    curves = {label: RunFolder(path).metrics() for label, path in first.items()}
    if any(curves.values()):
        pictures.append(folder / "losses.png")
        plot_curves(curves, [task.name for task in comparison.tasks], pictures[-1], title="first seed")
    for label, path in first.items():
        if (path / ROUTING).is_file():
            usage = json.loads((path / ROUTING).read_text(encoding="utf-8"))
            plot_usage(usage, folder / "routing" / label.replace(" ", "-"), title=label)
    return pictures


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation of scores, in per cent."""
    if not values:
        return MISSING
    text = percent(_average(values))
    return f"{text} +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else text


_RATES_NOTE = "Mean validation metric of the first seed, in per cent; the best rate was taken."


def _rates_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    rates = sorted({rate for entry in comparison.chosen for rate in entry.tried})
    lines = [
        [entry.label, *(percent(entry.tried.get(rate)) for rate in rates), f"{entry.learning_rate:g}"]
        for entry in comparison.chosen
    ]
    return ["method", *(f"{rate:g}" for rate in rates), "taken"], lines


def _draw_scores(comparison: Comparison, path: Path) -> None:
    base, tasks = comparison.any_results, comparison.tasks
    values: dict[str, list[float]] = {}
    whiskers: dict[str, list[float]] = {}
    if "base" in base.scores:
        values["base"], whiskers["base"] = [base.value("base", task) or 0.0 for task in tasks], [0.0] * len(tasks)
    for entry in comparison.chosen:
        per_task = [comparison.of_task(entry.label, task) for task in tasks]
        values[entry.label] = [_average(scores) for scores in per_task]
        whiskers[entry.label] = [statistics.stdev(scores) if len(scores) > 1 else 0.0 for scores in per_task]
    means = {label: _average(scores) for label, scores in values.items()}
    labels: Mapping[str, str] = {label: label for label in values}
    names = [task.name for task in tasks]
    plot_bars(names, values, path, labels=labels, title="Scores by task", means=means, spread=whiskers)


def _column(results: Results, column: str | None) -> str:
    return column or results.main_column or "base"


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
