"""Starting from the experts of an earlier run: to re-train one task, or to add one, without touching the others."""

import json
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from ..adapters import LoramuxModel
from ..support.errors import RunError
from .checkpoint import load_tensors
from .state import check_fits


@torch.no_grad()
def start_from(model: PeftModel, folder: Path) -> None:
    """Copy weights of an earlier mixture into a fresh model.

    Where both have the same tasks, every tensor is copied. Where the model has more tasks or another order, tensors
    that hold one row per task (experts, the router's classes) are copied row by row, by task name, and new tasks keep
    their fresh start.

    Args:
        folder: a run folder or a PEFT folder of the same method on the same base.

    Raises:
        RunError: the folder holds no mixture, or one that does not fit the model.
    """
    mixture = folder / "mixture" if (folder / "mixture").is_dir() else folder
    tasks = _tasks_of(mixture)
    saved = load_tensors(mixture / "adapter_model.safetensors")
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    own = list(cast(LoramuxModel, model.base_model).tasks)
    lost = [task for task in tasks if task not in own]
    if lost:
        raise RunError(f"{mixture}: has a task {lost[0]!r} that the recipe has not; its expert would be lost")
    by_task = tasks != own
    shapes = {n: _old_shape(t, len(own), len(tasks)) if by_task else tuple(t.shape) for n, t in live.items()}
    check_fits(shapes, saved, str(mixture))
    rows = torch.tensor([own.index(task) for task in tasks])
    for name, tensor in live.items():
        if by_task and tensor.dim() and tensor.shape[0] == len(own):
            tensor[rows] = saved[name].to(tensor)
        else:
            tensor.copy_(saved[name])


def _old_shape(tensor: Tensor, tasks: int, old_tasks: int) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return (old_tasks, *shape[1:]) if shape and shape[0] == tasks else shape


def _tasks_of(mixture: Path) -> list[str]:
    try:
        return list(json.loads((mixture / "adapter_config.json").read_text(encoding="utf-8"))["tasks"])
    except (OSError, ValueError, KeyError):
        raise RunError(f"{mixture}: holds no loramux mixture (no adapter_config.json with tasks)") from None
