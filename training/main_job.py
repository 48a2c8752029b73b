"""The whole job of `loramux train`: train, train the matched LoRA, evaluate, export, report."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..adapters import adapted_linears, adapter_parameters, matched_lora_rank
from ..support.console import say
from ..support.errors import ConfigError
from ..support.files import write_json
from ..tasks import EncodedTask
from .assess import (
    BASELINE,
    MARKDOWN,
    PREDICTIONS,
    RESULTS,
    draw_report,
    encode_tasks,
    measure_columns,
    measure_exports,
    note_routing,
    results_of,
    write_results,
)
from .distributed import make_accelerator
from .evaluate import Scores, hub_of
from .exports import EXPORTS, REFUSED, export_run, identity_of
from .recipe import BaselineConfig, EvaluateConfig, Recipe
from .report import COLUMNS, Results, refusals, show
from .run import TrainedRun, on_main, train_run
from .run_folder import RunFolder

_HINT = " Use --allow-lossy to export it all the same"


def train_job(recipe: Recipe, folder: Path, *, resume: bool = False) -> Results:
    """Train what the recipe says and leave a folder with everything people want to see of it.

    Args:
        resume: go on with what is in `folder`; finished parts are kept.

    Raises:
        ConfigError, DataError, AdapterError, RunError, TrainingDiverged: as `train_run`.
    """
    trained = train_run(recipe, folder, resume=resume)
    if recipe.baseline.enabled:
        train_matched_lora(trained)
    return evaluate_job(trained, recipe.evaluate, export=recipe.export.enabled)


def train_matched_lora(trained: TrainedRun) -> None:
    """Train the plain LoRA of equal parameter count beside a run, in its folder `baseline`.

    A run that is that LoRA itself has none beside it, and neither has one whose training a LoRA could not share.

    Raises:
        RunError: the LoRA would be trained on other examples than the run was.
    """
    if trained.recipe.method.name == "lora":
        return
    if not trained.recipe.train.is_whole:
        say("no matched LoRA: it would not have had the same training (train.start_from or train.only_tasks is set)")
        return
    rank, beside = rank_of_matched_lora(trained), RunFolder(trained.folder.path / BASELINE)
    if not beside.is_finished:
        trained.folder.check_tasks(trained.tasks)
    say(f"the plain LoRA of equal size: rank {rank}")
    train_run(matched_lora_recipe(trained.recipe, rank), beside.path, resume=True)


def rank_of_matched_lora(trained: TrainedRun) -> int:
    hub = hub_of(trained.model)
    assert hub is not None
    return matched_lora_rank(adapter_parameters(hub), adapted_linears(hub))


def matched_lora_recipe(recipe: Recipe, rank: int) -> Recipe:
    """The same run with a plain LoRA of `rank`, at the baseline's own learning rate if it has one."""
    return replace(
        recipe,
        method=recipe.method.lora(rank),
        train=replace(recipe.train, learning_rate=recipe.baseline_rate),
        baseline=BaselineConfig(enabled=False),
    )


def evaluate_job(
    trained: TrainedRun,
    config: EvaluateConfig,
    *,
    export: bool = False,
    base_scores: Scores | None = None,
    quiet: bool = False,
) -> Results:
    """Measure a finished run, export its tasks first if asked to, write the report and, unless `quiet`, print it."""
    accelerator = make_accelerator(replace(trained.recipe.train, trackers=()))
    trained.model.to(accelerator.device)
    folder, tasks = trained.folder.path, encode_tasks(trained)
    scores, answers = measure_columns(trained, tasks, config, base_scores=base_scores)
    if export:
        on_main(accelerator, lambda: _export(trained, tasks, scores))
    if exported := measure_exports(trained, tasks, config, answers):
        scores["exported"] = exported
    results = results_of(trained, tasks, config, scores)

    def write() -> None:
        note_routing(trained, tasks, config)
        write_results(folder, results, answers)
        pictures = draw_report(folder)
        if not quiet:
            show(results)
            say(_closing(results, folder, pictures))

    on_main(accelerator, write)
    return results


def new_run_folder(method: str, root: Path = Path("runs")) -> Path:
    """The first unused folder for a run of `method`: `runs/moa`, `runs/moa-2` and so on."""
    number = 1
    while (folder := root / (method if number == 1 else f"{method}-{number}")).exists():
        number += 1
    return folder


def _export(trained: TrainedRun, tasks: list[EncodedTask], scores: Mapping[str, Scores]) -> None:
    folder = trained.folder.path / EXPORTS
    try:
        base = identity_of(trained)
    except ConfigError as error:
        say(f"no exports: {error}")
        return
    _, refused = export_run(
        trained,
        tasks,
        folder,
        base=base,
        allow_lossy=trained.recipe.export.allow_lossy,
        scores={task.name: _card_scores(task, scores) for task in tasks},
    )
    write_json(folder / REFUSED, {task: reason.removesuffix(_HINT) for task, reason in refused.items()})


def _card_scores(task: EncodedTask, scores: Mapping[str, Scores]) -> dict[str, float]:
    metric = task.task.metrics[0]
    return {f"{COLUMNS[column]} ({metric})": found[task.name][metric] for column, found in scores.items()}


def _closing(results: Results, folder: Path, pictures: list[Path]) -> str:
    """What lies where, and what to do with it."""
    refused = refusals(results)
    written = len(results.exports) - len(refused)
    overview = ", ".join(picture.name for picture in pictures if picture.parent == folder)
    lines = {
        MARKDOWN: f"the table, the exports, the settings ({RESULTS}: the same as data)",
        overview: "the pictures" + (", more in routing/" if (folder / "routing").is_dir() else ""),
        PREDICTIONS: "every answer, to read",
        "mixture/": "all experts and their router as one PEFT adapter (import loramux before loading it)",
    }
    if written:
        lines[f"{EXPORTS}/<task>/"] = f"{written} of {len(results.tasks)} tasks, as LoRAs for PEFT, vLLM, ..."
    if (folder / BASELINE).is_dir():
        lines[f"{BASELINE}/"] = "the matched LoRA, a run folder too"
    width = max(map(len, lines))
    parts = [f"Everything is in {folder}:", *(f"  {name.ljust(width)}  {what}" for name, what in lines.items())]
    parts += [f"Not exported: {reason}" for reason in refused]
    if refused:
        parts.append(f"To export them nevertheless: loramux export {folder} --all --to DIR --allow-lossy")
    return "\n".join(parts)
