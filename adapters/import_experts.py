"""Import: plain LoRAs that were trained elsewhere become the experts of a hub that has an expert per task."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel

from ..support.errors import AdapterError, ConfigError, did_you_mean
from .banks import Dense, DenseBank
from .branch import Branch, BranchConfig
from .cores import OutputMix
from .hub import LoramuxModel
from .layer import LoramuxLinear
from .lora_folder import PlainLora, read_lora
from .low_rank import LowRank
from .registry import method_config, methods, numbered_tasks


@torch.no_grad()
def import_experts(
    model: PeftModel, experts: Mapping[str, str | Path | PlainLora], *, base_names: Collection[str] | None = None
) -> dict[str, PlainLora]:
    """Make PEFT LoRAs the experts of tasks of a hub; experts of other tasks, and routers, stay as they are.

    Ranks, scales and modules may differ: every scale goes into B, and a LoRA that is narrower than the experts, or does
    not adapt a module, adds exactly what it added before. There B is zero and A keeps its start, so that the spare
    ranks can be trained. Prototypes that are read off the experts (Arrow) are read anew; those of prompts need prompts
    (`hub.finish_stage`).

    Args:
        model: a PEFT model whose active adapter is a loramux mixture.
        experts: by task, the folder of a PEFT LoRA, or one that was read before.
        base_names: as in `read_lora`; by default what the mixture and the model call their base.

    Returns:
        What was imported, by task.

    Raises:
        AdapterError: a folder cannot be imported (see `read_lora`) or does not fit the hub, or the method's experts do
            not belong to tasks; nothing has changed then.
    """
    hub = cast(LoramuxModel, model.base_model)
    adapter = hub.active_adapters[0]
    names = _names_of_base(hub, adapter) if base_names is None else base_names
    for task in experts:
        if task not in hub.tasks:
            raise AdapterError(f"no task {task!r} in this hub to import an expert for; {did_you_mean(task, hub.tasks)}")
    loras = {
        task: given if isinstance(given, PlainLora) else read_lora(Path(given), hub.model, base_names=names)
        for task, given in experts.items()
    }
    layers = {name: layer for name, layer in hub.layers().items() if layer.branches(adapter)}
    branches = {name: _expert_branch(layer, adapter, len(hub.tasks)) for name, layer in layers.items()}
    for task, lora in loras.items():
        _check_fits(task, lora, branches)
    for name, branch in branches.items():
        for task, lora in loras.items():
            _fill(branch, hub.tasks.index(task), lora.factors.get(name))
        branch.fit_prototypes()
    return loras


def takes_experts(branch: BranchConfig, tasks: int) -> bool:
    """Whether a branch has one whole LoRA per task."""
    bank = branch.bank
    is_plain = isinstance(bank, Dense) and not bank.shared_down and not bank.output_scale
    return is_plain and bank.experts == tasks and branch.mixing == OutputMix() and branch.scaling != 0


def _expert_branch(layer: LoramuxLinear, adapter: str, tasks: int) -> Branch:
    found = [branch for branch in layer.branches(adapter) if takes_experts(branch.config, tasks)]
    if len(found) != 1:
        raise AdapterError(
            f"this method has no single plain LoRA per task to import one into ({tasks} tasks); methods that have: "
            f"{', '.join(_methods_with_experts())}"
        )
    return found[0]


def _methods_with_experts() -> list[str]:
    tasks = numbered_tasks(7)  # so many that no method's default number of experts is that by chance
    found = []
    for name in methods():
        with suppress(ConfigError):
            branches = method_config(name, tasks=tasks).branches
            found += [name] if sum(takes_experts(branch, len(tasks)) for branch in branches) == 1 else []
    return found


def _names_of_base(hub: LoramuxModel, adapter: str) -> set[str]:
    names = (hub.peft_config[adapter].base_model_name_or_path, getattr(hub.model, "name_or_path", None))
    return {name for name in names if name}


def _check_fits(task: str, lora: PlainLora, branches: Mapping[str, Branch]) -> None:
    for name, pair in lora.factors.items():
        if name not in branches:
            raise AdapterError(
                f"the LoRA for {task!r} adapts {name!r}, which this hub does not; add it to target_modules"
            )
        bank = cast(DenseBank, branches[name].bank)
        if (pair.down.shape[1], pair.up.shape[0]) != (bank.down.shape[2], bank.up.shape[2]):
            raise AdapterError(f"the LoRA for {task!r} was read for another base: {name!r} has other sizes there")
        rank = bank.down.shape[1]
        if pair.rank > rank:
            raise AdapterError(
                f"the LoRA for {task!r} has rank {pair.rank} at {name!r}, the hub's experts {rank}; raise their rank"
            )


def _fill(branch: Branch, expert: int, pair: LowRank | None) -> None:
    bank = cast(DenseBank, branch.bank)
    bank.up[expert].zero_()
    if pair is not None:
        bank.down[expert, : pair.rank] = pair.down.to(bank.down)
        bank.up[expert, : pair.rank] = (pair.up.T / branch.config.scaling).to(bank.up)
