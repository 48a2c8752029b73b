"""What the claims share: tasks, runs and figures that are kept between calls, tables."""

import argparse
import json
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from loramux.support.files import write_json, write_text
from loramux.tasks import read_task_configs
from loramux.training.evaluate import Routing, Scores, evaluate_tasks
from loramux.training.recipe import (
    BaselineConfig,
    EvaluateConfig,
    ExportConfig,
    MethodChoice,
    Recipe,
    TrainConfig,
)
from loramux.training.report import markdown_table
from loramux.training.run import TrainedRun, encode_all, train_run

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


def tasks(*names: str, cue: bool = False) -> list[dict[str, Any]]:
    """Generated tasks as a recipe takes them.

    Args:
        cue: whether the prompt names the task.
    """
    return [
        {
            "name": name,
            "source": {"generated": name},
            "prompt": f"{name}: {{input}}\n" if cue else "{input}\n",
            "target": "{target}",
            "metrics": ["accuracy" if name == "kind" else "exact_match"],
            "max_new_tokens": 16,
        }
        for name in names
    ]


def recipe(
    method: str,
    options: Mapping[str, Any],
    learnt: list[dict[str, Any]],
    *,
    rate: float,
    seed: int,
    steps: int = 300,
    **train: Any,
) -> Recipe:
    """A run on the bundled base, with nothing beside it."""
    return Recipe(
        tasks=learnt,
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
        kept_at = path / "validation.json"
        return float(kept(kept_at, lambda: mean_metric(scores(trained(run(rate, seed), path), "validation"))))

    return max(rates, key=validated) if len(rates) > 1 else rates[0]


def measured(
    run: Run, folder: Path, rate: float, seed: int, measure: Callable[[TrainedRun], Any] = lambda run: scores(run)
) -> Any:
    """A measurement of the run at a rate with a seed, kept beside it."""
    path = folder / f"lr-{rate:g}-seed-{seed}"
    return kept(path / "measured.json", lambda: measure(trained(run(rate, seed), path)))


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
