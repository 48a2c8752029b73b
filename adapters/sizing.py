"""How large an adapter is, and which plain LoRA is as large."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..routing import Router
from .blocks import NO_BLOCK, Block
from .branch import Branch
from .hub import LoramuxModel
from .registry import MethodConfig


@dataclass(frozen=True)
class Linear:
    """An adapted linear, as far as an adapter's size depends on it.

    Attributes:
        depth: 0 at the first layer and below 1.
        block: the feed-forward block around it.
    """

    in_features: int
    out_features: int
    depth: float = 0.0
    block: Block | None = None


def check_ranks(method: MethodConfig, linears: Iterable[Linear]) -> None:
    """Raise ValueError when experts have a higher rank than a linear they adapt can hold; the narrowest is named."""
    for linear in sorted(linears, key=lambda linear: min(linear.in_features, linear.out_features)):
        for branch in method.at(linear.depth, in_block=linear.block is not None):
            branch.check_rank(linear.in_features, linear.out_features)


def count_parameters(method: MethodConfig, linears: Iterable[Linear], *, tasks: int, hidden_size: int) -> int:
    """Trainable parameters of a method on such linears, counted on modules without memory.

    Raises:
        ValueError: when the method cannot serve one of them.
    """
    linears = list(linears)
    shapes = [(linear.in_features, linear.out_features) for linear in linears]
    if method.in_blocks and not any(linear.block for linear in linears):
        raise ValueError(NO_BLOCK)
    first_of = {linear.block: number for number, linear in reversed(list(enumerate(linears)))}
    with torch.device("meta"):
        layers = [
            Branch(
                branch,
                linear.in_features,
                linear.out_features,
                tasks,
                block_width=linear.block.width if linear.block and first_of[linear.block] == number else None,
            )
            for number, linear in enumerate(linears)
            for branch in method.at(linear.depth, in_block=linear.block is not None)
        ]
        routers = [
            Router(branch.router, hidden_size, tasks, branch.gates, len(linears))
            for branch in method.branches
            if branch.router is not None and branch.is_shared
        ]
        banks = [common for branch in method.branches if (common := branch.bank.common(shapes)) is not None]
    return sum(p.numel() for module in [*layers, *routers, *banks] for p in module.parameters())


def adapter_parameters(hub: LoramuxModel) -> int:
    """Parameters of the active adapters, trainable at this stage or not."""
    return sum(p.numel() for group in hub.grouped_parameters().values() for _, p in group)


def adapted_linears(hub: LoramuxModel) -> list[Linear]:
    return [
        Linear(layer.in_features, layer.out_features, hub.depth_of(name), hub.blocks.get(name))
        for name, layer in hub.layers().items()
    ]


def matched_lora_rank(parameters: int, linears: Iterable[Linear]) -> int:
    """The rank at which a plain LoRA on such linears has the nearest number of parameters."""
    return max(1, round(parameters / sum(linear.in_features + linear.out_features for linear in linears)))
