"""The result of a run as one table: per task what the base, a plain LoRA, the method and its exports score."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..support.console import show_table
from ..support.errors import RunError

Scores = dict[str, dict[str, float]]
COLUMNS = {
    "base": "base",
    "lora": "matched LoRA",
    "adapted": "adapted",
    "auto": "router decides",
    "named": "task named",
    "exported": "exported",
}
"""What is scored, in the order of the table, and how it is called there."""
FORMAT = 1
MISSING = "-"


@dataclass(frozen=True)
class TaskInfo:
    """A task as the table shows it; `metric` is its main one."""

    name: str
    metric: str
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything the final table and its plots are made of.

    Attributes:
        title: the method, in words.
        run: what a reader must know beside the scores: base, method, options, parameters, seed, split.
        tasks: in the order of the table.
        scores: per column (a key of `COLUMNS`), per task, the metrics and the loss.
        exports: per task how its export was made and what it lost.
    """

    title: str
    run: dict[str, Any]
    tasks: list[TaskInfo]
    scores: dict[str, Scores]
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        return [column for column in COLUMNS if column in self.scores]

    @property
    def main_column(self) -> str | None:
        """The method at its best use: the task is named, or the router decides where naming it changes nothing."""
        return next((column for column in ("named", "auto", "adapted") if column in self.scores), None)

    def value(self, column: str, task: TaskInfo) -> float | None:
        """The main metric of a task; None for a task that was not exported."""
        return self.scores[column].get(task.name, {}).get(task.metric)

    def values(self, column: str) -> list[float]:
        """The main metrics of the tasks that have one."""
        return [value for task in self.tasks if (value := self.value(column, task)) is not None]

    def mean(self, column: str) -> float | None:
        """The mean over all tasks of their main metrics; None when one is missing."""
        values = self.values(column)
        return sum(values) / len(values) if len(values) == len(self.tasks) else None

    def worst(self, column: str) -> float | None:
        values = self.values(column)
        return min(values) if len(values) == len(self.tasks) else None

    def routing_accuracy(self, task: TaskInfo) -> float | None:
        """How often the router picked the task's own expert, where experts belong to tasks."""
        return self.scores.get("auto", {}).get(task.name, {}).get("routing_accuracy")

    def to_data(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            **asdict(self),
            "summary": {c: {"mean": self.mean(c), "worst": self.worst(c)} for c in self.columns},
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any], where: str) -> "Results":
        """The inverse of `to_data`.

        Raises:
            RunError: when `data` is not what this version writes.
        """
        if data.get("format") != FORMAT:
            raise RunError(f"{where}: format {data.get('format')!r} is not {FORMAT}; run `loramux evaluate` again")
        try:
            tasks = [TaskInfo(**task) for task in data["tasks"]]
            parts = {key: data[key] for key in ("title", "run", "scores", "exports")}
        except (KeyError, TypeError) as error:
            raise RunError(f"{where}: not a results file ({error}); run `loramux evaluate` again") from None
        return cls(tasks=tasks, **parts)


def header(results: Results) -> list[str]:
    gains = [{"base": "vs base", "lora": "vs LoRA"}[other] for other in _compared(results)]
    routed = ["routed right"] if _shows_routing(results) else []
    return ["task", "metric", *(COLUMNS[column] for column in results.columns), *gains, *routed]


def rows(results: Results) -> list[list[str]]:
    """One row per task, then the mean and the worst task; scores in per cent."""
    columns = results.columns
    lines = [
        _row(results, task.name, task.metric, {c: results.value(c, task) for c in columns}, [task])
        for task in results.tasks
    ]
    lines.append(_row(results, "mean", "", {c: results.mean(c) for c in columns}, results.tasks))
    lines.append(_row(results, "worst task", "", {c: results.worst(c) for c in columns}, []))
    return lines


def show(results: Results) -> None:
    """Print the table, without the names of the metrics."""
    lines = [[line[0], *line[2:]] for line in [header(results), *rows(results)]]
    show_table(f"{results.title}: {caption(results)}", lines[0], lines[1:])


def to_markdown(results: Results) -> str:
    """The whole report: what was run, the table, the exports."""
    parts = [f"# {results.title}", caption(results) + ".", markdown_table(header(results), rows(results))]
    if results.exports:
        parts += ["## Exports", EXPORT_NOTE, markdown_table(*export_table(results))]
        parts += [f"Not exported: {reason}" for reason in refusals(results)]
    described = [f"- `{task.name}`: {task.description}" for task in results.tasks if task.description]
    if described:
        parts += ["## Tasks", "\n".join(described)]
    facts = [f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in results.run.items()]
    parts += ["## Run", "\n".join(facts)]
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A pipe table with aligned source; the first column left, the others right."""
    cells = [[_escaped(cell) for cell in line] for line in (head, *lines)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in cells
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:]))


def describe_split(results: Results) -> str:
    """The split that was scored, and the tasks without it, of which the validation examples were."""
    wanted = results.run.get("split", "test")
    without = [task for task, used in results.run.get("split_per_task", {}).items() if used != wanted]
    return f"{wanted} split" + (f" (validation for: {', '.join(without)})" if without else "")


def percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def gain(value: float | None, other: float | None) -> str:
    """The difference in points, signed; a zero has no sign."""
    if value is None or other is None:
        return MISSING
    text = f"{100 * (value - other):+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def refusals(results: Results) -> list[str]:
    """Why tasks were not exported, one reason per task."""
    return [str(facts["refused"]) for facts in results.exports.values() if "refused" in facts]


EXPORT_NOTE = (
    "Each task as a plain PEFT LoRA. `token KL` is the mean divergence (nats) of its next-token distributions from the "
    "routed model's on held-out answers; `base KL` is that of the base without any adapter, as a scale."
)


def _row(
    results: Results, name: str, metric: str, values: Mapping[str, float | None], tasks: Sequence[TaskInfo]
) -> list[str]:
    main = results.main_column
    gains = [gain(values[main], values[other]) for other in _compared(results) if main]
    routed = [_routed_right(results, tasks)] if _shows_routing(results) else []
    return [name, metric, *(percent(values[column]) for column in results.columns), *gains, *routed]


def _routed_right(results: Results, tasks: Sequence[TaskInfo]) -> str:
    known = [share for share in map(results.routing_accuracy, tasks) if share is not None]
    return percent(sum(known) / len(known)) if known else ""


def _compared(results: Results) -> list[str]:
    return [column for column in ("base", "lora") if column in results.scores and results.main_column]


def _shows_routing(results: Results) -> bool:
    return any(results.routing_accuracy(task) is not None for task in results.tasks)


def caption(results: Results) -> str:
    """What the figures of the table are."""
    main = results.main_column
    used = f"; gains are of '{COLUMNS[main]}'" if main and _compared(results) else ""
    return f"main metric per task on the {describe_split(results)}, in per cent{used}"


def export_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """How each task's export was made and what it lost: head and rows."""
    columns = {
        "how": "made",
        "rank": "rank",
        "token_kl": "token KL",
        "base_kl": "base KL",
        "top1_agreement": "same top token",
        "max_logit_difference": "max logit difference",
    }
    lines = [[name, *(_plain(facts.get(key, MISSING)) for key in columns)] for name, facts in results.exports.items()]
    return ["task", *columns.values()], lines


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_plain(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
