"""Starting from experts that are there: those of an earlier run, to re-train a task or add one without touching the
others, or plain LoRAs that were trained elsewhere."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import hf_hub_download
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from ..adapters import LoramuxModel, PlainLora, method_config, read_lora
from ..adapters.lora_folder import CONFIG, WEIGHTS
from ..bases import resolve_base
from ..support.errors import ConfigError, RunError
from .checkpoint import MANIFEST, load_tensors, verify_manifest
from .recipe import Recipe
from .run_folder import RunFolder, base_fingerprint
from .state import check_fits


@dataclass(frozen=True)
class Earlier:
    """A mixture to start from: its folder and the tasks it was trained on, in its order."""

    mixture: Path
    tasks: list[str]


def find_earlier(recipe: Recipe, base: nn.Module) -> Earlier | None:
    """The mixture that `train.start_from` names, if it does.

    Args:
        base: the bare base, before any adapter is put on it.

    Raises:
        RunError: there is no whole mixture, or it is of another method or, where its run folder tells, on another base.
    """
    if not isinstance(recipe.train.start_from, str):
        return None
    mixture = _whole_mixture(Path(recipe.train.start_from), recipe.base.model, base)
    method, tasks = _method_and_tasks(mixture)
    if method != recipe.method.name:
        raise RunError(
            f"{mixture}: trained with method {method!r}, not {recipe.method.name!r}; give that method (method.name), "
            "or start from another run (train.start_from)"
        )
    return Earlier(mixture, tasks)


@torch.no_grad()
def start_from(model: PeftModel, earlier: Earlier) -> None:
    """Copy weights of an earlier mixture into a fresh model.

    Where both have the same tasks, every tensor is copied. Where the model has more tasks or another order, tensors
    that hold one row per task (experts, the router's classes) are copied row by row, by task name, and new tasks keep
    their fresh start; that takes experts which belong to tasks.

    Raises:
        RunError: the mixture does not fit the model.
    """
    mixture, tasks = earlier.mixture, earlier.tasks
    saved = load_tensors(mixture / "adapter_model.safetensors")
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    hub = cast(LoramuxModel, model.base_model)
    own = hub.tasks
    lost = [task for task in tasks if task not in own]
    if lost:
        raise RunError(f"{mixture}: has a task {lost[0]!r} that the recipe has not; its expert would be lost")
    by_task = tasks != own and _depends_on_tasks(hub)
    if by_task and not hub.experts_belong_to_tasks:
        raise RunError(
            f"{mixture}: its experts do not belong to single tasks, so only a run of the same tasks in the same order "
            f"can start from it: {', '.join(tasks)}"
        )
    shapes = {n: _old_shape(t, len(own), len(tasks)) if by_task else tuple(t.shape) for n, t in live.items()}
    check_fits(shapes, saved, str(mixture))
    rows = torch.tensor([own.index(task) for task in tasks])
    for name, tensor in live.items():
        if by_task and tensor.dim() and tensor.shape[0] == len(own):
            tensor[rows] = saved[name].to(tensor)
        else:
            tensor.copy_(saved[name])


def find_loras(recipe: Recipe, base: nn.Module, public_name: str) -> dict[str, PlainLora]:
    """The plain LoRAs that `train.start_from` names, by task; none where it names none.

    Args:
        base: the bare base.
        public_name: the name under which others find it.

    Raises:
        ConfigError: a folder or an id cannot be found.
        AdapterError: what is there cannot be imported, see `read_lora`.
    """
    if not isinstance(recipe.train.start_from, dict):
        return {}
    called = {recipe.base.model, resolve_base(recipe.base.model), public_name, *recipe.base.also_called}
    return {
        task: read_lora(fetch_lora(source), base, base_names=called) for task, source in recipe.train.start_from.items()
    }


def fetch_lora(source: str) -> Path:
    """The folder of an adapter: one of this machine, or what the Hub has under `owner/name` or `owner/name@revision`.

    Of a repository the config and the safetensors are fetched, and nothing else.

    Raises:
        ConfigError: there is no such folder, and no such repository that could be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    repository, _, revision = source.partition("@")
    try:
        found = [hf_hub_download(repository, file, revision=revision or None) for file in (CONFIG, WEIGHTS)]
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"{source!r}: no such folder, and its {CONFIG} and {WEIGHTS} cannot be had from the Hub: {reason}"
        ) from None
    return Path(found[0]).parent


def _depends_on_tasks(hub: LoramuxModel) -> bool:
    """Whether the adapter has parts for each task; else it is the same whatever the tasks are."""
    config = hub.peft_config[hub.active_adapters[0]]
    if hub.needs_task:
        return True
    more = method_config(config.method, tasks=[*config.tasks, "one more"], options=config.options)
    return [branch.bank for branch in more.branches] != [branch.bank for branch in hub.method().branches]


def _old_shape(tensor: Tensor, tasks: int, old_tasks: int) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return (old_tasks, *shape[1:]) if shape and shape[0] == tasks else shape


def _whole_mixture(folder: Path, name: str, base: nn.Module) -> Path:
    """The mixture of a run folder, or a PEFT folder itself, checked as far as files beside it allow."""
    run = RunFolder(folder.parent if folder.name == "mixture" else folder)
    if run.recipe_file.is_file():
        run.check_base(base_fingerprint(base), name)
        return run.verify_mixture()
    if (folder / MANIFEST).is_file():
        verify_manifest(folder)
    return folder


def _method_and_tasks(mixture: Path) -> tuple[str, list[str]]:
    try:
        config = json.loads((mixture / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config["method"]), list(config["tasks"])
    except (OSError, ValueError, KeyError):
        raise RunError(f"{mixture}: holds no loramux mixture (no adapter_config.json with method and tasks)") from None
