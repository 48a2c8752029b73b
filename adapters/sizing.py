"""How large an adapter is, and which plain LoRA is as large."""

from collections.abc import Iterable

import torch

from ..routing import Router, RouterDims
from .branch import Branch
from .hub import LoramuxModel
from .registry import MethodConfig

Shapes = Iterable[tuple[int, int]]


def count_parameters(method: MethodConfig, shapes: Shapes, *, tasks: int, hidden_size: int) -> int:
    """Trainable parameters of a method on linears of `shapes` (in, out), counted on modules without memory."""
    with torch.device("meta"):
        layers = [
            Branch(branch, in_features, out_features, tasks)
            for in_features, out_features in shapes
            for branch in method.branches
        ]
        shared = [
            Router(branch.router, RouterDims(hidden_size, tasks, branch.gates))
            for branch in method.branches
            if branch.router is not None and branch.router.shared
        ]
    return sum(p.numel() for module in [*layers, *shared] for p in module.parameters())


def adapter_parameters(hub: LoramuxModel) -> int:
    """Parameters of the active adapters, trainable at this stage or not."""
    return sum(p.numel() for group in hub.grouped_parameters().values() for _, p in group)


def adapted_shapes(hub: LoramuxModel) -> list[tuple[int, int]]:
    """(in, out) of every adapted linear."""
    return [(layer.in_features, layer.out_features) for layer in hub.layers().values()]


def matched_lora_rank(parameters: int, shapes: Shapes) -> int:
    """The rank at which a plain LoRA on linears of `shapes` has the nearest number of parameters."""
    return max(1, round(parameters / sum(map(sum, shapes))))
