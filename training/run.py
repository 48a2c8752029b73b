"""A whole run: from a recipe to a finished run folder, and back from the folder to the model."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import LoramuxConfig, PlainLora, find_method, import_experts
from ..bases import base_identity, load_base
from ..support.console import say
from ..support.errors import ConfigError, LoramuxError, did_you_mean
from ..tasks import EncodedTask, Mixture, Task, encode_task, load_tasks
from .answers import positions_of
from .batches import MixtureBatches
from .distributed import from_main, make_accelerator
from .loop import Evaluate, Trainer
from .recipe import MethodChoice, Recipe
from .run_folder import RunFolder, base_fingerprint
from .schedule import without_experts
from .state import adapter_weights
from .validation import validation
from .warm_start import find_earlier, find_loras, start_from

T = TypeVar("T")
_ONE_THREAD = 4_000_000  # parameters
LONGEST = 1024  # tokens, where neither the recipe nor the model's config sets a limit


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: the model with its adapters, in evaluation mode, and what it was trained on."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    tasks: list[Task]
    recipe: Recipe
    folder: RunFolder


def train_run(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    evaluate: Evaluate | Literal["validation"] | None = "validation",
) -> TrainedRun:
    """Train what the recipe says and leave the result in `folder`.

    Several processes (started by `accelerate launch` or `torchrun`) call this alike and share the folder's disk.

    Args:
        resume: go on from the newest whole checkpoint in `folder`; a finished run is just opened.
        evaluate: `evaluate(model, step)`, called on every process; its `metric` picks the best weights. `validation`
            is the mean of the tasks' main metrics on their validation examples; None evaluates nothing and keeps the
            last weights.

    Raises:
        ConfigError, DataError, AdapterError: the recipe, its tasks or its method cannot be used.
        RunError: the folder holds another run, or cannot be written.
        TrainingDiverged: see `Trainer.train`.
    """
    run = RunFolder(folder)
    accelerator = make_accelerator(recipe.train, run.path)
    state = on_main(accelerator, lambda: run.open(recipe, resume=resume))
    if state == "finished":
        say(f"{run.path}: this run is finished")
        return load_run(run.path)
    try:
        tasks = load_tasks(recipe.tasks)
        trainer = _trainer(recipe, tasks, run, accelerator, evaluate)
    except LoramuxError:
        if state == "new" and accelerator.is_main_process:
            run.forget()
        raise
    _start_trackers(accelerator, recipe)
    trainer.train()
    weights = adapter_weights(trainer.model)
    on_main(accelerator, lambda: run.write_mixture(trainer.model, weights))
    for tracker in accelerator.trackers:
        tracker.finish()
    return load_run(run.path, tasks=tasks)


def _trainer(
    recipe: Recipe,
    tasks: list[Task],
    run: RunFolder,
    accelerator: Accelerator,
    evaluate: Evaluate | Literal["validation"] | None,
) -> Trainer:
    """What trains a recipe; whatever may be wrong with it shows here, before the first step."""
    if not tasks:
        raise ConfigError("tasks: there are none to train on; name a task file (tasks: FILE)")
    base, tokenizer = open_base(recipe)
    fingerprint = base_fingerprint(base)
    model: Any = build_model(base, recipe, [task.name for task in tasks])
    batches = build_batches(recipe, tasks, tokenizer, base, accelerator)
    on_main(accelerator, lambda: run.note_environment(fingerprint, recipe, batches))
    how = "length-bucketed batches" if recipe.mixture.bucket_by_length else "mixture.bucket_by_length would lower it"
    say(f"padding: {batches.padding_waste:.0%} of positions ({how})")
    if evaluate == "validation":
        evaluate = validation(tokenizer, batches.tasks, recipe.evaluate)
    stages = without_experts(model.base_model.stages) if recipe.train.only_tasks == () else None
    return Trainer(model, batches, recipe.train, accelerator, run, evaluate, stages)


def load_run(folder: str | Path, *, tasks: list[Task] | None = None, trainable: bool = False) -> TrainedRun:
    """Open a finished run, in this process or any other.

    Args:
        tasks: the run's tasks, if they are loaded already.
        trainable: whether its adapter will be trained on.

    Raises:
        RunError: this is no finished run, a file of its mixture is damaged, or the base is not the one it belongs to.
    """
    run = RunFolder(folder)
    mixture = run.verify_mixture()
    recipe = run.read_recipe()
    base, tokenizer = open_base(recipe)
    run.check_base(base_fingerprint(base), recipe.base.model)
    model = PeftModel.from_pretrained(base, str(mixture), is_trainable=trainable).eval()
    if trainable:
        _save_memory(base, recipe)
    return TrainedRun(model, tokenizer, load_tasks(recipe.tasks) if tasks is None else tasks, recipe, run)


def open_base(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model of a recipe and its tokenizer.

    A model of a few million weights then has one thread on a CPU, unless OMP_NUM_THREADS says otherwise: its operations
    are too short to share, and on a busy machine threads that wait for each other cost several times the run.
    """
    base, tokenizer = load_base(recipe.base.model, dtype=recipe.base.dtype, revision=recipe.base.revision)
    if base.num_parameters() < _ONE_THREAD and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return base, tokenizer


def build_model(
    base: Any, recipe: Recipe, task_names: Sequence[str], *, loras: Mapping[str, PlainLora] | None = None
) -> PeftModel:
    """Put the recipe's method on a base, with the recipe's seed and, if it says so, earlier weights.

    Args:
        loras: what `train.start_from` names, if it was read already.

    Raises:
        ConfigError: the method or its options are not valid, or `method.target_modules` matches nothing.
        RunError, AdapterError: `train.start_from` holds nothing that fits.
    """
    earlier = find_earlier(recipe, base)
    loras = find_loras(recipe, base, public_name(recipe)) if loras is None else loras
    set_seed(recipe.train.seed)
    targets = recipe.method.target_modules
    config = LoramuxConfig(
        method=recipe.method.name,
        options=_options(recipe.method, loras),
        tasks=list(task_names),
        excess_rank=recipe.method.excess_rank or _takes_rank_of(recipe.method, loras),
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=public_name(recipe),
    )
    try:
        model: Any = get_peft_model(base, config)
    except LoramuxError:
        raise
    except ValueError as error:
        raise ConfigError(f"method.target_modules (={targets!r}): {error}") from None
    config.base_model_name_or_path = public_name(recipe)  # PEFT puts the path of this machine there
    if earlier is not None:
        start_from(model, earlier)
    if loras:
        import_experts(model, loras)
    _save_memory(base, recipe)
    if recipe.train.compile:
        model.compile(dynamic=True)
    return model


def _takes_rank_of(method: MethodChoice, loras: Mapping[str, PlainLora]) -> bool:
    """Whether experts are as wide as the widest LoRA that becomes one, since no rank is given."""
    return bool(loras) and "rank" not in method.options


def _options(method: MethodChoice, loras: Mapping[str, PlainLora]) -> dict[str, Any]:
    fitting = {"rank": max(lora.rank for lora in loras.values())} if _takes_rank_of(method, loras) else {}
    known = find_method(method.name).options()
    return {**{key: value for key, value in fitting.items() if key in known}, **method.options}


def build_batches(
    recipe: Recipe, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, base: Any, accelerator: Accelerator
) -> MixtureBatches:
    """Encode the tasks and order them; what is too long for the model is counted and told."""
    encoded = encode_all(tasks, recipe, tokenizer, base)
    for task in encoded:
        for note in task.notes:
            say(f"{task.name}: {note}")
    return MixtureBatches(
        encoded,
        _mixture(recipe, encoded),
        pad_id=tokenizer.pad_token_id or 0,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        parts=recipe.train.accumulation,
        only=_only(recipe, encoded),
    )


def encode_all(
    tasks: Sequence[Task], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, model: nn.Module
) -> list[EncodedTask]:
    """The tasks as token ids, without what is longer than the recipe allows, or else than the model takes."""
    max_length = recipe.train.max_length or positions_of(model) or LONGEST
    return [encode_task(task, tokenizer, max_length=max_length) for task in tasks]


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Do something once, on the main process; its result, or its error, is every process's."""
    result: Any = None
    error: LoramuxError | None = None
    if accelerator.is_main_process:
        try:
            result = work()
        except LoramuxError as raised:
            error = raised
    result, error = from_main((result, error)) if accelerator.num_processes > 1 else (result, error)
    if error is not None:
        raise error
    return result


def _mixture(recipe: Recipe, tasks: Sequence[EncodedTask]) -> Mixture:
    config, lengths = recipe.mixture, {task.name: task.lengths for task in tasks}
    if config.weights is not None and recipe.train.only_tasks is not None:
        config = replace(config, weights={name: share for name, share in config.weights.items() if name in lengths})
    return Mixture(lengths, config, batch_size=recipe.train.batch_size, seed=recipe.train.seed)


def _only(recipe: Recipe, tasks: Sequence[EncodedTask]) -> tuple[Mixture, list[int]] | None:
    if not recipe.train.only_tasks:
        return None
    names = [task.name for task in tasks]
    for name in recipe.train.only_tasks:
        if name not in names:
            raise ConfigError(f"train.only_tasks: no task {name!r}; {did_you_mean(name, names)}")
    numbers = [number for number, name in enumerate(names) if name in recipe.train.only_tasks]
    return _mixture(recipe, [tasks[number] for number in numbers]), numbers


def _save_memory(base: Any, recipe: Recipe) -> None:
    if recipe.train.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def public_name(recipe: Recipe) -> str:
    """The base as others can find it; for a folder nobody else has, its path is the best there is."""
    try:
        return base_identity(recipe.base.model, revision=recipe.base.revision, known_as=recipe.base.known_as).name
    except ConfigError:
        return recipe.base.model


def _start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    if recipe.train.trackers:
        accelerator.init_trackers("loramux", config={"method": recipe.method.name, "seed": recipe.train.seed})
