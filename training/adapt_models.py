"""What learns a new task: a copy of a hub that the task has joined, or a plain LoRA; and from which examples."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..adapters import LoramuxModel, LowRank, NewTask, adapter_parameters, even_blend, find_method
from ..adapters.banks import DenseBank
from ..support.errors import ConfigError, DataError, did_you_mean
from ..tasks import EncodedTask, Task
from .adapt_ways import Way
from .recipe import MethodChoice
from .run import TrainedRun, build_model
from .usage import routing_usage


@dataclass(frozen=True)
class Learner:
    """A model that is about to learn a task.

    Attributes:
        model: with its adapter.
        method: what the adapter is.
        trained: how many numbers will train.
        new: what the task brought to a hub; None for a plain LoRA.
    """

    model: Any
    method: MethodChoice
    trained: int
    new: NewTask | None = None


def join_hub(run: TrainedRun, way: Way, task: EncodedTask, options: Mapping[str, Any]) -> Learner:
    """Take a task into a hub and hold all of it that the way does not train.

    Args:
        run: a copy that is nobody else's.
        options: of the method, where they are given task by task.
    """
    hub = hub_in(run.model)
    nearest = _nearest_experts(run, task) if way.start == "nearest" else None
    new = hub.add_task(task.name, options)
    if way.start == "mean":
        new.start_at_mean()
    if nearest is not None:
        new.start_as_blend(nearest)
    hub.hold(new.all_but(way.trains))
    method = replace(run.recipe.method, options={**run.recipe.method.options, **options})
    return Learner(run.model, method, new.count(way.trains), new)


def plain_lora(run: TrainedRun, way: Way, task: str, rank: int, seed: int) -> Learner:
    """A plain LoRA on the base of a hub.

    Args:
        run: a copy that is nobody else's; its adapter is taken off.
        rank: of one that starts fresh; the even blend of the experts has a rank of its own.
    """
    factors = even_blend(hub_in(run.model)) if way.start == "even" else {}
    rank = max((pair.rank for pair in factors.values()), default=rank)
    method = run.recipe.method.lora(rank)
    recipe = replace(run.recipe, method=method, train=replace(run.recipe.train, seed=seed, start_from=None))
    model = build_model(run.model.unload(), recipe, [task])
    hub = hub_in(model)
    _put(hub, factors)
    return Learner(model, method, adapter_parameters(hub))


def options_with(hub: LoramuxModel, task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method that are given task by task, with what they are for a new task.

    Args:
        given: by option, its value for the new task.

    Raises:
        ConfigError: for an option that the method has not, that is one for all tasks, or that says nothing of the task.
    """
    config = hub.peft_config[hub.active_adapters[0]]
    by_task = {name: value for name, value in config.options.items() if _is_by_task(value, config.tasks)}
    for name in given:
        if name not in (known := find_method(config.method).options()):
            raise ConfigError(f"--method-option {name}: no option of {config.method!r}; {did_you_mean(name, known)}")
        if name not in by_task:
            raise ConfigError(
                f"--method-option {name}: the run gives it for all tasks at once ({config.options[name]!r}), so a task "
                f"that joins cannot change it; given task by task: {', '.join(by_task) or 'none'}"
            )
    for name, value in by_task.items():
        if name not in given:
            said = ", ".join(f"{other}: {value[other]}" for other in config.tasks)
            raise ConfigError(f"method {config.method!r} wants {name} of {task!r}: --method-option {name}=... ({said})")
    return {name: {**value, task: given[name]} for name, value in by_task.items()}


def with_shots(task: EncodedTask, shots: int | None, seed: int) -> EncodedTask:
    """The task with so many of its training examples, drawn by the seed; None leaves all.

    Raises:
        DataError: when it has fewer.
    """
    size = len(task.splits["train"])
    if shots is None:
        return task
    if shots > size:
        raise DataError(f"--shots {shots}: task {task.name!r} has {size} training examples; ask for no more than these")
    chosen = sorted(random.Random(f"{seed}/{task.name}").sample(range(size), shots))
    examples = {**task.examples, "train": tuple(task.examples["train"][i] for i in chosen)}
    splits = {**task.splits, "train": tuple(task.splits["train"][i] for i in chosen)}
    return replace(task, task=replace(task.task, splits=dict(examples)), splits=splits, examples=examples)


def with_examples(task: Task, sizes: Mapping[str, int]) -> Task:
    """The task with at most so many examples in each of these splits, the same ones each time, and no other splits."""
    splits: dict[str, Sequence[Any]] = {}
    for split, size in sizes.items():
        examples = task.splits[split]
        chosen = sorted(random.Random(task.name).sample(range(len(examples)), min(size, len(examples))))
        splits[split] = tuple(examples[i] for i in chosen)
    return replace(task, splits=splits)


def hub_in(model: Any) -> LoramuxModel:
    """The tuner of a loramux model."""
    return cast(LoramuxModel, model.base_model)


def _is_by_task(value: Any, tasks: Sequence[str]) -> bool:
    return isinstance(value, Mapping) and set(value) == set(tasks)


@torch.no_grad()
def _nearest_experts(run: TrainedRun, task: EncodedTask) -> Tensor:
    """`(tasks,)`: the share of a new task's prompts that the router of prompts would send to each expert."""
    usage = routing_usage(run.model, run.tokenizer, [task], split="train")
    assert usage is not None
    (prompts,) = usage.layers.values()
    return prompts.weights[0] / prompts.tokens[0]


@torch.no_grad()
def _put(hub: LoramuxModel, factors: Mapping[str, LowRank]) -> None:
    """Give a plain LoRA these factors; ranks beyond theirs stay fresh and add nothing."""
    for name, pair in factors.items():
        (branch,) = hub.layers()[name].branches(hub.active_adapters[0])
        assert isinstance(branch.bank, DenseBank)
        branch.bank.down[0, : pair.rank], branch.bank.up[0, : pair.rank] = pair.down, pair.up.T
