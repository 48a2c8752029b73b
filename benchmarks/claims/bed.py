"""What the claims share: tasks, runs and figures that are kept between calls, tables."""

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from loramux.adapters import LoramuxModel, adapter_parameters
from loramux.support.files import write_json, write_text
from loramux.tasks import read_task_configs
from loramux.tasks.generated import FAMILY_OF
from loramux.training.evaluate import Routing, Scores, evaluate_tasks
from loramux.training.recipe import (
    BaselineConfig,
    EvaluateConfig,
    ExportConfig,
    MethodChoice,
    MixtureConfig,
    Recipe,
    TrainConfig,
)
from loramux.training.report import markdown_table
from loramux.training.run import TrainedRun, encode_all, load_run, train_run

SHIPPED = tuple(task.name for task in read_task_configs("default"))
RATES = (1e-3, 3e-3)
Run = Callable[[float, int], Recipe]
"""The recipe of one contender at a learning rate, with a seed."""


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """With `--to`, the folder that keeps runs and results, and `--seeds`."""
    result = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    result.add_argument("--to", type=Path, default=Path("claims") / name)
    result.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    return result


def tasks(*names: str, cue: bool = False, train: int | None = None) -> list[dict[str, Any]]:
    """Generated tasks as a recipe takes them.

    Args:
        cue: whether the prompt names the task.
        train: at most so many training examples of each.
    """
    return [_task(name, f"{name}: {{input}}\n" if cue else "{input}\n", train) for name in names]


def _task(name: str, prompt: str, train: int | None) -> dict[str, Any]:
    if name not in FAMILY_OF:
        raise ValueError(f"{name!r} is no generated task: {', '.join(FAMILY_OF)}")
    metric = "accuracy" if name == "kind" else "exact_match"
    source = {"generated": name}
    task = {"name": name, "source": source, "prompt": prompt, "target": "{target}", "metrics": [metric]}
    return task | {"max_new_tokens": 16, "limit": {"train": train}}


def recipe(
    method: str,
    options: Mapping[str, Any],
    learnt: list[dict[str, Any]],
    *,
    rate: float,
    seed: int,
    steps: int = 300,
    weights: Mapping[str, float] | None = None,
    **train: Any,
) -> Recipe:
    """A run on the bundled base, with nothing beside it."""
    mixture = MixtureConfig() if weights is None else MixtureConfig(strategy="weights", weights=dict(weights))
    return Recipe(
        tasks=learnt,
        mixture=mixture,
        method=MethodChoice(name=method, options=dict(options)),
        train=TrainConfig(steps=steps, learning_rate=rate, seed=seed, **train),
        baseline=BaselineConfig(enabled=False),
        evaluate=EvaluateConfig(),
        export=ExportConfig(enabled=False),
    )


def trained(what: Recipe, folder: Path) -> TrainedRun:
    """The finished run in `folder`, trained first if it is not there; the weights are those of the last step."""
    return train_run(what, folder, resume=True, evaluate=None)


def scores(run: TrainedRun, split: str = "test", routing: Routing = "named") -> Scores:
    """Metrics and losses of a run by task."""
    encoded = encode_all(run.tasks, run.recipe, run.tokenizer, run.model)
    return evaluate_tasks(run.model, run.tokenizer, encoded, split=split, routing=routing, title=None)


def main_metrics(found: Scores) -> dict[str, float]:
    """Every task's main metric, in per cent."""
    return {task: 100 * values["accuracy" if task == "kind" else "exact_match"] for task, values in found.items()}


def mean_metric(found: Scores) -> float:
    """The mean over tasks of their main metrics, in per cent."""
    return mean(main_metrics(found).values())


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, as JSON in `path`; made once."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text())


def tuned(run: Run, folder: Path, rates: Sequence[float] = RATES, seed: int = 0) -> float:
    """The learning rate with the best mean validation metric for one seed."""

    def validated(rate: float) -> float:
        path = folder / f"lr-{rate:g}-seed-{seed}"
        return float(
            kept(path / "validation.json", lambda: mean_metric(scores(trained(run(rate, seed), path), "validation")))
        )

    return max(rates, key=validated) if len(rates) > 1 else rates[0]


def measured(
    run: Run, folder: Path, rate: float, seed: int, measure: Callable[[TrainedRun], Any] = lambda run: scores(run)
) -> Any:
    """A measurement of the run at a rate with a seed, kept beside it."""
    path = folder / f"lr-{rate:g}-seed-{seed}"
    return kept(path / "measured.json", lambda: measure(trained(run(rate, seed), path)))


def opened(folder: Path, rate: float, seed: int) -> TrainedRun:
    return load_run(folder / f"lr-{rate:g}-seed-{seed}")


@dataclass(frozen=True)
class Contender:
    """One line of a contest.

    Attributes:
        method: with its `options`.
        learnt: its tasks, where they are not those of the contest.
    """

    method: str
    options: Mapping[str, Any]
    learnt: list[dict[str, Any]] | None = None

    def run(self, learnt: list[dict[str, Any]], steps: int) -> Run:
        return lambda rate, seed: recipe(
            self.method, self.options, self.learnt or learnt, rate=rate, seed=seed, steps=steps
        )


def contest(
    args: argparse.Namespace,
    title: str,
    learnt: list[dict[str, Any]],
    contenders: Mapping[str, Contender],
    *,
    steps: int = 200,
    rates: Sequence[float] = RATES,
    judged: Sequence[str] | None = None,
    extra: Mapping[str, Callable[[TrainedRun], float]] | None = None,
) -> None:
    """Train contenders on the same tasks, each at its best rate, and show their scores.

    Args:
        judged: the tasks whose mean is shown; None: all.
        extra: further columns.
    """
    rows, data = [], {}
    names = list(judged or [task["name"] for task in learnt])

    def measure(run: TrainedRun) -> dict[str, Any]:
        hub = cast(LoramuxModel, run.model.base_model)
        figures = {name: figure(run) for name, figure in (extra or {}).items()}
        return {"parameters": adapter_parameters(hub), "scores": scores(run), "extra": figures}

    for label, contender in contenders.items():
        folder, run = args.to / label.replace(" ", "-").replace("/", "-"), contender.run(learnt, steps)
        rate = tuned(run, folder, rates)
        found = [measured(run, folder, rate, seed, measure) for seed in args.seeds]
        metrics = [main_metrics(one["scores"]) for one in found]
        means = [mean(one[name] for name in names) for one in metrics]
        losses = [mean(one["scores"][name]["loss"] for name in names) for one in found]
        by_task = [over_seeds([one[name] for one in metrics]) for name in names]
        figures = [over_seeds([one["extra"][name] for one in found]) for name in extra or {}]
        parameters = f"{found[0]['parameters']:,}"
        rows.append([label, parameters, f"{rate:g}", over_seeds(means), over_seeds(losses, 3), *by_task, *figures])
        data[label] = {"rate": rate, "runs": found}
    show(
        args.to / f"{args.to.name}.json",
        title,
        ["", "parameters", "rate", "mean", "loss", *names, *(extra or {})],
        rows,
        data,
    )


def over_seeds(values: Sequence[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"


def show(path: Path, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], data: Any) -> None:
    """Print a table in Markdown, and leave it with its data in `path`."""
    table = markdown_table(header, rows)
    print(f"{title}\n\n{table}")
    write_json(path, {"title": title, "header": list(header), "rows": [list(row) for row in rows], "data": data})
    write_text(path.with_suffix(".md"), f"{title}\n\n{table}\n")
