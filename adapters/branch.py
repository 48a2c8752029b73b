"""A branch: one bank and one router at one frozen linear. A layer's delta is the sum of its branches.

Two paths compute the same function. The core path runs all experts and weights their activations; it serves every
granularity. The materialise path first builds the factors of each row's decision; it serves every decision that is
constant over tokens, runs only the experts that are open, and is what an exact export writes down.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routing import Granularity, Router, RouterConfig, RouterDims, RoutingContext
from .banks import BankConfig, DenseBank, joined

_LARGEST_RANK = 1 << 16
"""Far above any use; a config from a stranger must not ask for all memory."""


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """One branch of a method.

    Attributes:
        bank: the experts.
        scaling: factor on the delta (alpha / rank in LoRA).
        router: how experts are weighted; None when all are always on.
        block_size: adjacent ranks that share one weight. None means the rank of an expert; 1 makes every rank an
            expert of its own (SMoRA).
        dropout: probability of dropping an input feature of the experts in training; the router sees all of them.
    """

    bank: BankConfig
    scaling: float = 1.0
    router: RouterConfig | None = None
    block_size: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        total = self.bank.experts * self.bank.rank
        if self.block_size is not None and (self.block_size < 1 or total % self.block_size):
            raise ValueError(f"block_size (={self.block_size}) must divide the total rank (={total})")
        if total > _LARGEST_RANK:
            raise ValueError(f"experts x rank (={total}) must be at most {_LARGEST_RANK}")
        if not math.isfinite(self.scaling):
            raise ValueError(f"the scaling alpha / rank (={self.scaling}) must be finite")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout (={self.dropout}) must be in [0, 1)")

    @property
    def gates(self) -> int:
        """How many weights the router gives."""
        return self.bank.experts * self.bank.rank // (self.block_size or self.bank.rank)

    @property
    def granularity(self) -> Granularity:
        return Granularity.FIXED if self.router is None else self.router.scorer.granularity


class Branch(nn.Module):
    """A bank and, unless the router is shared by the whole model, the router of one linear.

    Args:
        config: what to build.
        in_features, out_features: of the frozen linear.
        tasks: number of tasks.
        index: position among the branches of the method; keys the shared decisions of the context.
    """

    def __init__(self, config: BranchConfig, in_features: int, out_features: int, tasks: int, index: int = 0) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.bank = DenseBank(config.bank, in_features, out_features)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        own = config.router if config.router is not None and not config.router.shared else None
        self.router = Router(own, RouterDims(in_features, tasks, config.gates)) if own else None
        self.prefer_core_path = False

    def add_to(self, output: Tensor, x: Tensor, context: RoutingContext, adapter: str, layer: str) -> Tensor:
        """Return `output` plus this branch's delta for the inputs `x`.

        Args:
            output: `(..., out_features)` of the frozen linear.
            x: `(..., in_features)`, its input.
        """
        weights = self._weights(x, context, adapter, layer)
        x = self.dropout(x.to(self.bank.down.dtype))
        if self.config.granularity == Granularity.TOKEN or self.prefer_core_path:
            return self._core_path(output, x, weights)
        return self._materialise_path(output, x, weights)

    def materialise(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Build the factors of constant decisions.

        Args:
            weights: `(decisions, gates)`, or None for an unrouted branch.

        Returns:
            `A (decisions, rank, in_features)` and `B (decisions, rank, out_features)`, with the scaling in B, such
            that the delta is `x A^T B`. Experts that are closed for sure take no rank.
        """
        down, up = self.bank.down, self._scaled_up()
        if self.config.bank.shared_down:
            mixed = up.sum(0, keepdim=True) if weights is None else torch.einsum("ue,ero->uro", weights, up)
            return down.expand(len(mixed), -1, -1), mixed
        if weights is None:
            return joined(down).unsqueeze(0), joined(up).unsqueeze(0)
        blocks = (self.config.gates, -1)
        down, up = joined(down).unflatten(0, blocks), joined(up).unflatten(0, blocks)
        assert self.config.router is not None
        active = self.config.router.normaliser.max_active(self.config.gates)
        weight, chosen = weights.topk(active, dim=-1)
        return down[chosen].flatten(1, 2), (up[chosen] * weight[..., None, None]).flatten(1, 2)

    def _scaled_up(self) -> Tensor:
        up = self.bank.scaled_up()
        return up if self.config.scaling == 1 else up * self.config.scaling

    def _weights(self, x: Tensor, context: RoutingContext, adapter: str, layer: str) -> Tensor | None:
        if self.config.router is None:
            return None
        if self.router is None:
            return context.shared_decision(adapter, self.index).to(self.bank.down.dtype)
        tasks = context.tasks.get(adapter)
        decision = self.router(x, tasks)
        context.record(layer, self.router, decision, x, tasks)
        return decision.weights.to(self.bank.down.dtype)

    def _core_path(self, output: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
        hidden = F.linear(x, joined(self.bank.down))
        if weights is not None:
            hidden = self._gate(hidden, weights)
        elif self.config.bank.shared_down:
            hidden = hidden.repeat(*[1] * (hidden.dim() - 1), self.config.bank.experts)
        return add_product(output, hidden, joined(self._scaled_up()))

    def _gate(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """Weight activations `(..., rank)` by gates `(..., gates)`, or `(batch, gates)` constant over tokens."""
        shape = hidden.shape
        if self.config.granularity < Granularity.TOKEN:
            hidden, weights = hidden.reshape(len(weights), -1, shape[-1]), weights.unsqueeze(1)
        if self.config.bank.shared_down:
            gated = weights.unsqueeze(-1) * hidden.unsqueeze(-2)
        else:
            gated = weights.unsqueeze(-1) * hidden.unflatten(-1, (self.config.gates, -1))
        return gated.flatten(-2).reshape(*shape[:-1], -1)

    def _materialise_path(self, output: Tensor, x: Tensor, weights: Tensor | None) -> Tensor:
        down, up = self.materialise(weights)
        if weights is None:
            return add_product(output, F.linear(x, down[0]), up[0])
        # Beams and flattened tokens of one row lie next to each other, so one reshape serves them all.
        rows = x.reshape(len(weights), -1, x.shape[-1])
        hidden = torch.bmm(rows, down.transpose(1, 2))
        if output.dtype != hidden.dtype or torch.is_autocast_enabled(x.device.type):
            return output + torch.bmm(hidden, up).reshape(output.shape).to(output.dtype)
        return torch.baddbmm(output.reshape(len(weights), -1, output.shape[-1]), hidden, up).reshape(output.shape)


def add_product(output: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """`output + hidden @ up`, fused where the precisions agree."""
    if output.dtype != hidden.dtype or torch.is_autocast_enabled(output.device.type):
        return output + (hidden @ up).to(output.dtype)
    flat = torch.addmm(output.reshape(-1, output.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), up)
    return flat.reshape(output.shape)
