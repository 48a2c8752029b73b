"""What moves, how fast: parameter groups, the learning-rate schedule, clipping, and experts that must not move."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import MethodConfig
from .answer_logits import Reduction
from .distributed import full_tensor, rows_like
from .recipe import TrainConfig

NamedParameters = Sequence[tuple[str, nn.Parameter]]


def build_optimizer(
    groups: Mapping[str, NamedParameters], config: TrainConfig, method: MethodConfig
) -> torch.optim.AdamW:
    """AdamW over the parameters of `groups` (experts, router, task_logits) that require a gradient.

    Each group has its own learning rate: the recipe's, or else what the method says of it. Only factor matrices of
    experts decay: routers, task logits, biases and scales do not (a decayed gate drifts to uniform, a decayed scale to
    no adapter at all).
    """
    param_groups = []
    for name, members in groups.items():
        trained = [(key, parameter) for key, parameter in members if parameter.requires_grad]
        for decayed in (True, False):
            chosen = [(key, p) for key, p in trained if _decays(name, key, p) == decayed]
            if chosen:
                rate = learning_rate_of(name, config, method)
                decay = config.weight_decay if decayed else 0.0
                settings = {"lr": rate, "peak_lr": rate, "weight_decay": decay, "group": name}
                param_groups.append({"params": chosen, **settings})
    return torch.optim.AdamW(param_groups)


def learning_rate_of(group: str, config: TrainConfig, method: MethodConfig) -> float:
    """The peak learning rate of a parameter group."""
    if group == "router":
        return config.router_learning_rate or method.router_rate * config.learning_rate
    if group == "task_logits":
        return config.task_logit_learning_rate or method.task_logit_rate * config.learning_rate
    return config.learning_rate


def schedule_factor(step: int, steps: int, config: TrainConfig) -> float:
    """The part of the peak learning rate at `step` (0-based) of a stage of `steps`: linear warm-up, then the schedule.

    A pure function of the step, so there is no scheduler state to save.
    """
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(steps - warmup, 1)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rates(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def parameter_names(optimizer: Any) -> list[tuple[str, nn.Parameter]]:
    """Every parameter of the optimiser with its name, in its order."""
    return [
        (name, parameter)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]


@torch.no_grad()
def clip_gradients(optimizer: Any, max_norm: float | None, tasks: int, reduction: Reduction) -> float:
    """Clip all gradients by their common norm and return that norm, over all processes.

    Under `task` reduction every expert `[tasks, ...]` is clipped by a norm of its own, and everything else by another:
    side by side, one expert's large gradient would otherwise shorten the steps of all others, which separate runs
    would not see.
    """
    graded = [parameter for _, parameter in parameter_names(optimizer) if parameter.grad is not None]
    norm = _norm(graded)
    if max_norm is None or not math.isfinite(float(norm)):
        return float(norm)
    stacked = _stacked(optimizer, tasks) if reduction == "task" else []
    if stacked:
        _clip_each_expert(stacked, max_norm)
        chosen = {id(parameter) for parameter in stacked}
        graded = [parameter for parameter in graded if id(parameter) not in chosen]
    if graded:
        torch.nn.utils.clip_grads_with_norm_(graded, max_norm, _norm(graded) if stacked else norm)
    return float(norm)


def _stacked(optimizer: Any, tasks: int) -> list[nn.Parameter]:
    """Parameters with a gradient that hold one expert per task."""
    experts = [group for group in optimizer.param_groups if group["group"] == "experts"]
    return [p for group in experts for p in group["params"] if p.grad is not None and p.shape[0] == tasks]


def _clip_each_expert(stacked: Sequence[nn.Parameter], max_norm: float) -> None:
    gradients = [parameter.grad for parameter in stacked if parameter.grad is not None]
    squares = [full_tensor(g.float().square().sum(dim=tuple(range(1, g.dim())))) for g in gradients]
    factors = (max_norm / (torch.stack(squares).sum(0).sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(rows_like(gradient, factors.to(gradient.dtype)))


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def _decays(group: str, name: str, parameter: Tensor) -> bool:
    return group == "experts" and parameter.dim() > 1 and name.rpartition(".")[2] not in ("bias", "scale")
