"""Import: LoRAs that were trained elsewhere become a run folder, as if its experts had been trained here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import LoramuxModel, LowRank, PlainLora, measure_fidelity
from ..adapters.card import import_card
from ..adapters.export import short_names
from ..adapters.lora_folder import declared_base
from ..bases.load import refuse_used_folder
from ..routing import Granularity
from ..support.config import apply_overrides, parse
from ..support.errors import ConfigError, did_you_mean
from ..support.files import atomic_folder
from ..tasks import Task, load_tasks, read_task_configs
from .batches import MixtureBatches
from .checkpoint import writing
from .distributed import make_accelerator
from .loop import PROTOTYPE_EXAMPLES
from .recipe import MethodChoice, Recipe, public_place, resolve_paths
from .run import build_batches, build_model, open_base, public_name
from .run_folder import RunFolder, base_fingerprint
from .schedule import without_experts
from .state import adapter_weights
from .warm_start import fetch_lora, find_loras

_ALL_LINEAR = MethodChoice().target_modules
_PROBE_ROWS, _PROBE_TOKENS = 4, 16


@dataclass(frozen=True)
class Imported:
    """What came in.

    Attributes:
        task: the expert's name.
        source: the folder or Hub id it came from, as the recipe has it.
        lora: what was read.
        difference: largest logit difference between the mixture with this task named and the base with this LoRA alone,
            over random tokens; None where tokens choose their experts themselves.
    """

    task: str
    source: str
    lora: PlainLora
    difference: float | None


def import_recipe(
    experts: Sequence[str],
    *,
    method: str,
    base: str | None = None,
    tasks: str | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """The recipe of an import.

    Args:
        experts: `task=source` each, where the source is a folder or a Hub id.
        base: the frozen model; None takes the one that all LoRAs name.
        tasks: a task file.
        overrides: as for `load_recipe`.

    Raises:
        ConfigError: a task is named twice, the LoRAs name no common base, or a key is not valid.
    """
    sources = dict(text.split("=", 1) for text in experts)
    if len(sources) < len(experts):
        raise ConfigError(f"a task is named twice: {', '.join(text.split('=', 1)[0] for text in experts)}")
    data: dict[str, Any] = {
        "base": {"model": base or _common_base(sources.values())},
        "tasks": tasks or [],
        "method": {"name": method},
        "train": {"start_from": sources, "only_tasks": []},
    }
    return parse(Recipe, resolve_paths(apply_overrides(data, overrides), Path.cwd()), where="import")


def import_run(recipe: Recipe, folder: Path) -> tuple[list[Imported], list[str]]:
    """Write a run folder whose experts are the LoRAs that `train.start_from` names by task.

    Nothing is trained. Prototypes of routers are fitted; other routers are new. The recipe that is left in the folder
    trains these and keeps the experts as they are.

    Args:
        recipe: without tasks (`tasks: []`) the folder can be loaded and served, not evaluated. A rank that is not given
            is that of the widest LoRA, and where all linears are to be adapted, those are that any LoRA adapts.

    Returns:
        What came in, and the names of the stages that still have something to train.

    Raises:
        ConfigError, DataError: names, tasks and method do not fit each other, or the folder is in use.
        AdapterError: a LoRA cannot be imported, see `read_lora`; nothing has been written then.
        RunError: the folder cannot be written.
    """
    sources = recipe.train.start_from
    assert isinstance(sources, dict)
    refuse_used_folder(folder)
    tasks, names = _tasks_of(recipe, list(sources))
    base, tokenizer = open_base(recipe)
    fingerprint = base_fingerprint(base)
    loras = find_loras(recipe, base, public_name(recipe))
    recipe = replace(recipe, method=_fitting(recipe.method, loras, base))
    model = build_model(base, recipe, names, loras=loras).eval()
    batches = build_batches(recipe, tasks, tokenizer, base, make_accelerator(recipe.train)) if tasks else None
    hub: LoramuxModel = model.base_model  # type: ignore[assignment]
    stages = without_experts(hub.stages)
    for stage in stages:
        hub.finish_stage(stage, lambda: _prompts(recipe.method.name, batches))
    imported = [Imported(task, sources[task], loras[task], _difference(hub, task, loras[task])) for task in names]
    with writing(folder), atomic_folder(folder) as staging:
        run = RunFolder(staging)
        run.open(recipe, resume=False)
        run.note_environment(fingerprint, recipe, batches)
        run.write_mixture(model, adapter_weights(model), _card(recipe, imported))
    return imported, [stage.name for stage in stages if stage.train]


def _common_base(sources: Iterable[str]) -> str:
    """The base that all these adapters name."""
    named = {source: declared_base(fetch_lora(source)) for source in sources}
    names = {name for name in named.values() if name}
    if len(names) != 1:
        told = "; ".join(f"{source} names {name or 'none'}" for source, name in named.items())
        raise ConfigError(f"the LoRAs do not name one base ({told}); say which (--base)")
    return names.pop()


def _tasks_of(recipe: Recipe, experts: list[str]) -> tuple[list[Task], list[str]]:
    """The recipe's tasks and their names, in its order; without tasks the experts' names, which must do as such."""
    if not recipe.tasks:
        read_task_configs([{"name": name} for name in experts])
        return [], experts
    tasks = load_tasks(recipe.tasks)
    names = [task.name for task in tasks]
    for name in experts:
        if name not in names:
            raise ConfigError(f"an expert is called {name!r}, and no task is; {did_you_mean(name, names)}")
    for name in names:
        if name not in experts:
            raise ConfigError(f"task {name!r} has no expert; name its LoRA too ({name}=FOLDER), or leave the task out")
    return tasks, names


def _fitting(method: MethodChoice, loras: Mapping[str, PlainLora], base: torch.nn.Module) -> MethodChoice:
    """The method on what the LoRAs adapt, where it was to adapt whatever there is."""
    if method.target_modules != _ALL_LINEAR:
        return method
    adapted = {name for lora in loras.values() for name in lora.factors}
    return replace(method, target_modules=tuple(short_names(adapted, base)))


def _prompts(method: str, batches: MixtureBatches | None) -> Iterable[Mapping[str, Tensor]]:
    """What prototypes of prompts are fitted on."""
    if batches is None:
        raise ConfigError(f"method {method!r} looks at prompts of every task; name them (--tasks FILE)")
    return (batch.inputs for batch in batches.samples(PROTOTYPE_EXAMPLES))


def _difference(hub: LoramuxModel, task: str, lora: PlainLora) -> float | None:
    if hub.granularity == Granularity.TOKEN:
        return None
    nothing = {
        name: LowRank(torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1))
        for name, layer in hub.layers().items()
    }
    return measure_fidelity(hub, task, {**nothing, **lora.factors}, [_probe(hub)]).max_logit_difference


def _probe(hub: LoramuxModel) -> dict[str, Tensor]:
    """Random tokens; what experts add does not depend on whether they make sense."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = hub.model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (_PROBE_ROWS, _PROBE_TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _card(recipe: Recipe, imported: Sequence[Imported]) -> str:
    facts = [
        {
            "task": expert.task,
            "from": public_place(expert.source),
            "names its base": public_place(expert.lora.base or ""),
            "modules": str(len(expert.lora.factors)),
            "largest rank": str(expert.lora.rank),
            "SHA-256 of its weights": expert.lora.sha256,
        }
        for expert in imported
    ]
    return import_card(recipe.method.name, public_place(public_name(recipe)), recipe.base.revision, facts)
