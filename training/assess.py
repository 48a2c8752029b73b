"""Measuring a finished run: base, matched LoRA, routed model and exports over the same examples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..adapters import adapter_parameters
from ..routing import Granularity
from ..support.config import to_data
from ..support.errors import RunError
from ..support.files import write_json, write_text
from ..tasks import EncodedTask
from .evaluate import Prediction, Routing, Scores, evaluate_tasks, hub_of
from .exports import EXPORTS, REFUSED, evaluate_exports
from .plots import plot_curves, plot_scores, plot_usage
from .recipe import EvaluateConfig
from .report import Results, TaskInfo, to_markdown
from .run import TrainedRun, encode_all, load_run, open_base
from .run_folder import RunFolder
from .usage import routing_usage, usage_data

BASELINE = "baseline"
RESULTS, MARKDOWN, ROUTING, PREDICTIONS = "results.json", "results.md", "routing.json", "predictions.jsonl"
Answers = dict[str, list[Prediction]]
"""Predictions by column of the table."""


def encode_tasks(run: TrainedRun) -> list[EncodedTask]:
    """The tasks of a run as it was trained on them.

    Raises:
        RunError: it has none, because its experts were imported without.
    """
    if not run.tasks:
        raise RunError(
            f"{run.folder.path}: imported without tasks, so there are no examples to measure it on; import it again "
            "with --tasks FILE, or name the file in its recipe.yaml (tasks: FILE)"
        )
    return encode_all(run.tasks, run.recipe, run.tokenizer, run.model)


def measure_columns(
    run: TrainedRun, tasks: Sequence[EncodedTask], config: EvaluateConfig, *, base_scores: Scores | None = None
) -> tuple[dict[str, Scores], Answers]:
    """Score the base, the matched LoRA where one was trained beside, and the run's own model.

    Args:
        base_scores: the base's scores, when they are known already.
    """
    scores: dict[str, Scores] = {} if base_scores is None else {"base": base_scores}
    answers: Answers = {}

    def measure(column: str, model: Any, routing: Routing, title: str) -> None:
        answers[column] = []
        scores[column] = evaluate_tasks(
            model,
            run.tokenizer,
            tasks,
            split=config.split,
            routing=routing,
            limit=config.limit,
            batch_size=config.batch_size,
            length_normalised=config.length_normalised,
            predictions=answers[column],
            title=title,
        )

    if base_scores is None:
        with run.model.disable_adapter():
            measure("base", run.model, "named", "the base")
    if RunFolder(run.folder.path / BASELINE).is_finished:
        baseline = load_run(run.folder.path / BASELINE, tasks=run.tasks)
        measure("lora", baseline.model.to(run.model.device), "named", "the matched LoRA")
    for column, routing in columns_of(run).items():
        measure(column, run.model, routing, f"{run.recipe.method.name}, {column}")
    return scores, answers


def columns_of(run: TrainedRun) -> dict[str, Routing]:
    """The ways of asking a method: its router decides, the task is named, or neither makes a difference."""
    hub = hub_of(run.model)
    assert hub is not None
    if hub.granularity == Granularity.FIXED:
        return {"adapted": "auto"}
    columns: dict[str, Routing] = {} if hub.needs_task else {"auto": "auto"}
    return columns if hub.granularity == Granularity.TOKEN and columns else {**columns, "named": "named"}


def measure_exports(
    run: TrainedRun, tasks: Sequence[EncodedTask], config: EvaluateConfig, answers: Answers
) -> Scores | None:
    """Score the exports in the run folder with stock PEFT; None where there are none."""
    folder = run.folder.path / EXPORTS
    base, _ = open_base(run.recipe)
    answers["exported"] = []
    found = evaluate_exports(base.to(run.model.device), run.tokenizer, tasks, folder, config, answers["exported"])
    return found or None


def exports_on_disk(folder: Path) -> dict[str, dict[str, Any]]:
    """What each export's own report says about how it was made and what it lost, or why there is none."""
    refused = folder / REFUSED
    facts: dict[str, dict[str, Any]] = {}
    if refused.is_file():
        reasons = json.loads(refused.read_text(encoding="utf-8"))
        facts = {task: {"refused": reason} for task, reason in reasons.items()}
    for path in sorted(folder.glob("*/export.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        facts[report["task"]] = {**{key: report[key] for key in ("how", "rank", "faults")}, **report["fidelity"]}
    return facts


def results_of(
    run: TrainedRun, tasks: Sequence[EncodedTask], config: EvaluateConfig, scores: dict[str, Scores]
) -> Results:
    """The table of a run and the facts a reader needs beside it."""
    recipe, hub = run.recipe, hub_of(run.model)
    assert hub is not None
    facts: dict[str, Any] = {
        "base": hub.peft_config[hub.active_adapters[0]].base_model_name_or_path,
        "method": recipe.method.name,
        "options": dict(hub.peft_config[hub.active_adapters[0]].options),
        "routed": hub.granularity.name.lower(),
        "parameters": adapter_parameters(hub),
        "steps": recipe.train.steps,
        "batch_size": recipe.train.batch_size,
        "learning_rate": recipe.train.learning_rate,
        "seed": recipe.train.seed,
        "split": config.split,
        "evaluate": to_data(config),
        "split_per_task": {task.name: task.split_used(config.split) for task in tasks},
        "measured_on": {task.name: task.task.fingerprint_of(task.split_used(config.split)) for task in tasks},
        "examples_per_task": {task.name: int(_any(scores)[task.name]["examples"]) for task in tasks},
    }
    if (waste := run.folder.environment().get("padding_waste")) is not None:
        facts["padding_waste"] = waste
    baseline = RunFolder(run.folder.path / BASELINE)
    if baseline.is_finished:
        other = baseline.read_recipe()
        facts["matched_lora"] = {"rank": other.method.options["rank"], "learning_rate": other.train.learning_rate}
    infos = [TaskInfo(task.name, task.task.metrics[0], task.task.config.description) for task in tasks]
    found = exports_on_disk(run.folder.path / EXPORTS)
    exports = {task.name: found[task.name] for task in tasks if task.name in found}
    return Results(title=recipe.method.name, run=facts, tasks=infos, scores=scores, exports=exports)


def write_results(folder: Path, results: Results, answers: Answers) -> None:
    """Write the table's figures and every answer into a run folder."""
    lines = [{"column": column, **asdict(answer)} for column, listed in answers.items() for answer in listed]
    write_text(folder / PREDICTIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(folder / RESULTS, results.to_data())


def read_results(folder: Path) -> Results:
    """The results of an evaluated run.

    Raises:
        RunError: when there are none, or they are not readable.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise RunError(f"{folder}: no {RESULTS} there; run `loramux evaluate {folder}` first")
    try:
        return Results.from_data(json.loads(path.read_text(encoding="utf-8")), str(path))
    except json.JSONDecodeError as error:
        raise RunError(f"{path}, line {error.lineno}: {error.msg}; run `loramux evaluate {folder}` again") from None


def draw_report(folder: Path) -> list[Path]:
    """Make the Markdown table and all pictures of an evaluated run anew from its figures."""
    results = read_results(folder)
    write_text(folder / MARKDOWN, to_markdown(results))
    pictures = [folder / "scores.png"]
    plot_scores(results, pictures[0])
    curves = {results.title: RunFolder(folder).metrics()}
    if (folder / BASELINE).is_dir():
        curves["lora (matched)"] = RunFolder(folder / BASELINE).metrics()
    if any(curves.values()):
        pictures.append(folder / "losses.png")
        plot_curves(curves, [task.name for task in results.tasks], pictures[-1], title=results.title)
    if (folder / ROUTING).is_file():
        usage = json.loads((folder / ROUTING).read_text(encoding="utf-8"))
        pictures += plot_usage(usage, folder, title=results.title)
    return pictures


def note_routing(run: TrainedRun, tasks: Sequence[EncodedTask], config: EvaluateConfig) -> None:
    """Write who uses which expert, where the method has routers."""
    usage = routing_usage(
        run.model, run.tokenizer, tasks, split=config.split, limit=config.limit, batch_size=config.batch_size
    )
    hub = hub_of(run.model)
    if usage is not None and hub is not None:
        write_json(run.folder.path / ROUTING, usage_data(hub, usage))


def _any(scores: Mapping[str, Scores]) -> Scores:
    return next(iter(scores.values()))
