"""Banks: how the low-rank factors of the experts are stored, tied and initialised.

Factors are stacked over experts and kept as `(experts, rank, features)` on both sides, so that joining all experts
into one product is a view, not a copy.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """A dense bank.

    Attributes:
        experts: number of low-rank experts.
        rank: rank of each expert.
        shared_down: one A for all experts (HydraLoRA) instead of one each.
        output_scale: a trainable scale per expert and output unit, zero at the start; A and B are then both random
            (MultiLoRA).
    """

    experts: int = 1
    rank: int = 8
    shared_down: bool = False
    output_scale: bool = False

    def __post_init__(self) -> None:
        for name, value in (("experts", self.experts), ("rank", self.rank)):
            if value < 1:
                raise ValueError(f"{name} (={value}) must be at least 1")


class DenseBank(nn.Module):
    """Experts as dense factors.

    Shapes: `down` is `(experts or 1, rank, in_features)`, `up` is `(experts, rank, out_features)`, and `scale` is
    `(experts, out_features)` where there is one. The delta is zero at the start: `up` is zero, or `scale` is.
    """

    def __init__(self, config: BankConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = in_features, out_features
        self.down = nn.Parameter(torch.empty(1 if config.shared_down else config.experts, config.rank, in_features))
        self.up = nn.Parameter(torch.empty(config.experts, config.rank, out_features))
        self.scale = nn.Parameter(torch.zeros(config.experts, out_features)) if config.output_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LoRA's initialisation, expert by expert."""
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        if self.scale is None:
            nn.init.zeros_(self.up)
        else:
            # B is drawn as LoRA would draw an (out_features, rank) matrix: its fan-in is the rank.
            nn.init.uniform_(self.up, -1 / math.sqrt(self.config.rank), 1 / math.sqrt(self.config.rank))

    def scaled_up(self) -> Tensor:
        """`(experts, rank, out_features)`: the up factors with the output scale folded in."""
        return self.up if self.scale is None else self.up * self.scale.unsqueeze(1)


def joined(factor: Tensor) -> Tensor:
    """`(experts, rank, features)` as one factor of rank `experts * rank`; free of copies."""
    return factor.flatten(0, 1)
