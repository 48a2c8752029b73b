"""Opening a run folder to serve it: its base, its exports as adapters, its router, its mixture."""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..adapters import LoramuxModel
from ..adapters.lora_folder import CONFIG
from ..bases import resolve_base
from ..routing import Granularity
from ..support.console import say
from ..support.errors import ConfigError, DataError
from ..tasks import Task, load_tasks
from ..training.exports import EXPORTS, REFUSED
from ..training.recipe import Recipe
from ..training.run import load_run, public_name
from ..training.run_folder import RunFolder
from .choice import LearnedRouter
from .config import ServeConfig
from .errors import ServingError

EXAMPLES = 8
"""Prompts of each task from which prototypes are made."""


@dataclass(frozen=True)
class RunAdapters:
    """The adapters of a run.

    Attributes:
        root: the folder below which they lie.
        folders: by task.
        missing: why tasks that were not exported were not, by task, where that is known.
        base_names: what they may call their base.
    """

    root: Path
    folders: dict[str, Path]
    missing: dict[str, str]
    base_names: tuple[str, ...]


@dataclass(frozen=True)
class ServedRun:
    """What of a run is served.

    Attributes:
        model: what runs: the bare base, or the PEFT model around it where `mixture` is to be hosted.
        router: of methods that route by the prompt and have an expert per task.
        mixture: the name of a mixture that routes tokens.
        examples: prompts of the training examples, by task; empty where the tasks' data cannot be read here.
        notes: what the user should be told.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    adapters: RunAdapters
    router: LearnedRouter | None
    mixture: str | None
    examples: dict[str, tuple[str, ...]]
    notes: list[str] = field(default_factory=list)


def run_adapters(folder: Path) -> RunAdapters:
    """What a run has exported, without loading anything.

    Raises:
        RunError: this is no finished run, or its mixture is damaged.
    """
    run = RunFolder(folder)
    run.verify_mixture()
    recipe, root = run.read_recipe(), folder / EXPORTS
    found = _adapters_below(root)
    refused = root / REFUSED
    missing = json.loads(refused.read_text(encoding="utf-8")) if refused.is_file() else {}
    names = (recipe.base.model, resolve_base(recipe.base.model), public_name(recipe), *recipe.base.also_called)
    return RunAdapters(root, found, missing, tuple(dict.fromkeys(names)))


def register_all(
    places: Iterable[Path], runs: Iterable[RunAdapters], register: Callable[[str, Path], object]
) -> dict[Path, ServingError]:
    """Register the adapters of runs, and all that lie right below folders, under their folders' names.

    Returns:
        Why others were refused, by folder; they harm nobody, and the user is told.
    """
    folders = [pair for run in runs for pair in run.folders.items()]
    folders += [pair for place in places for pair in _adapters_below(place).items()]
    refused: dict[Path, ServingError] = {}
    for name, folder in folders:
        try:
            register(name, folder)
        except ServingError as error:
            refused[folder] = error
            say(f"{folder} is not served: {error}")
    return refused


def _adapters_below(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}


def check_run_settings(config: ServeConfig) -> None:
    """Raises ConfigError where settings contradict the runs that are served."""
    if config.base is not None or config.revision is not None:
        raise ConfigError("base: the runs bring theirs; leave base and revision out, or serve their exports (adapters)")
    if config.quantize is not None:
        raise ConfigError("quantize: adapters of a run belong to its whole base; serve its exports (adapters) instead")


def served_run(folder: Path) -> ServedRun:
    """Open a run to serve it.

    Raises:
        RunError: this is no finished run, its mixture is damaged, or its base is not the one it belongs to.
    """
    adapters = run_adapters(folder)
    notes = [f"task {task!r} has no adapter: {reason}" for task, reason in adapters.missing.items()]
    if not adapters.folders:
        notes.append(
            f"{folder}: no exports; `loramux export {folder} --all --to {adapters.root}` makes them, and --adapters "
            "serves the LoRAs that an imported run was made of"
        )
    tasks = _tasks(RunFolder(folder), notes)
    run = load_run(folder, tasks=tasks)
    hub: LoramuxModel = run.model.base_model  # type: ignore[assignment]
    mixture = _mixture_name(hub, [*hub.tasks, *adapters.folders])
    router = _router(hub)
    model: Any = run.model if mixture is not None else run.model.unload()
    examples = {task.name: _examples(task) for task in tasks}
    return ServedRun(model.eval(), run.tokenizer, run.recipe, adapters, router, mixture, examples, notes)


def _tasks(run: RunFolder, notes: list[str]) -> list[Task]:
    """The run's tasks; serving goes without where their data is not at hand."""
    try:
        return load_tasks(run.read_recipe().tasks)
    except (ConfigError, DataError) as error:
        notes.append(f"no example prompts of the run's tasks: {error}")
        return []


def _examples(task: Task) -> tuple[str, ...]:
    """Prompts from all over the training split, which may be sorted."""
    train = task.splits["train"]
    step = max(1, len(train) // EXAMPLES)
    return tuple(train[index].prompt for index in range(0, len(train), step)[:EXAMPLES])


def _router(hub: LoramuxModel) -> LearnedRouter | None:
    by_prompt = [router for router in hub.named_routers().values() if router.granularity == Granularity.SEQUENCE]
    if len(by_prompt) != 1 or not hub.experts_belong_to_tasks:
        return None
    return LearnedRouter(copy.deepcopy(by_prompt[0]).cpu().float().eval(), hub.tasks)


def _mixture_name(hub: LoramuxModel, taken: Sequence[str]) -> str | None:
    """What the mixture is served as, if it routes every token where it stands and so can share a batch."""
    if hub.granularity != Granularity.TOKEN or any(branch.is_shared for branch in hub.method().branches):
        return None
    method = hub.peft_config[hub.active_adapters[0]].method
    return f"{method}-mixture" if method in taken else method
