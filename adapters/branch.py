"""A branch: one bank, one core and one router at one frozen linear. A layer's delta is the sum of its branches."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..routing import (
    Decision,
    Granularity,
    Prototypes,
    Router,
    RouterConfig,
    RoutingContext,
    copy_corners,
    own_gates,
    router_name,
)
from .banks import BankConfig
from .cores import CoreConfig, HeadMix, OutputMix

_LARGEST_RANK = 1 << 16
"""Far above any use; a config from a stranger must not ask for all memory."""


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """One branch of a method.

    Attributes:
        bank: the experts.
        core: where the router's weights act; by default each expert's own, or the shared, way of mixing outputs.
        scaling: factor on the delta (alpha / rank in LoRA).
        router: how experts are weighted; None when all are always on.
        dropout: probability of dropping an input feature of the experts in training; the router sees all of them.
    """

    bank: BankConfig
    core: CoreConfig | None = None
    scaling: float = 1.0
    router: RouterConfig | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.core is None:
            object.__setattr__(self, "core", HeadMix() if self.bank.shared_down else OutputMix())
        total = self.bank.experts * self.bank.rank
        if total > _LARGEST_RANK:
            raise ValueError(f"experts x rank (={total}) must be at most {_LARGEST_RANK}")
        if not math.isfinite(self.scaling):
            raise ValueError(f"the scaling alpha / rank (={self.scaling}) must be finite")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout (={self.dropout}) must be in [0, 1)")
        if self.granularity == Granularity.TOKEN and not self.mixing.serves_tokens:
            raise ValueError(f"{type(self.core).__name__} needs weights that are constant over tokens")
        if self.router is not None and self.router.projected and not self.bank.shared_down:
            raise ValueError("a router can read what A makes of a token only where all experts share A")
        if self.router is not None and self.gates % self.router.groups:
            raise ValueError(f"groups (={self.router.groups}) must divide the number of gates (={self.gates})")

    @property
    def mixing(self) -> CoreConfig:
        assert self.core is not None
        return self.core

    @property
    def gates(self) -> int:
        """How many weights the router gives."""
        return self.mixing.num_gates(self.bank)

    @property
    def is_shared(self) -> bool:
        """Whether its router is one for the whole model."""
        return self.router is not None and self.router.shared

    @property
    def through_block(self) -> bool:
        """Whether its experts go through a whole feed-forward block, whose router chooses among them."""
        return self.router is not None and self.router.per_block

    @property
    def needs_task(self) -> bool:
        """Whether a call that names no task is an error."""
        return self.mixing.needs_task or (self.router is not None and self.router.scorer.needs_task)

    @property
    def granularity(self) -> Granularity:
        return Granularity.FIXED if self.router is None else self.router.scorer.granularity

    def check_rank(self, in_features: int, out_features: int) -> None:
        """Raise ValueError when an expert has a higher rank than any weight of a linear of these sizes."""
        rank, largest = self.mixing.expert_rank(self.bank), min(in_features, out_features)
        if rank > largest:
            raise ValueError(
                f"experts of rank {rank} are more than a linear of {in_features} x {out_features} can hold, which is "
                f"{largest}; lower the rank, leave such linears out of target_modules, or allow it (excess_rank: true)"
            )


class Branch(nn.Module):
    """The modules of one branch at one linear; its router too, unless that is shared by the whole model.

    Args:
        config: what to build.
        in_features, out_features: of the frozen linear.
        tasks: number of tasks.
        index: position among the branches of the method; keys the shared decisions of the context.
        block_width: of the input of the feed-forward block around it, at the one linear that holds the block's router.

    Raises:
        ValueError: when a linear of these sizes cannot be served.
    """

    def __init__(
        self,
        config: BranchConfig,
        in_features: int,
        out_features: int,
        tasks: int,
        index: int = 0,
        block_width: int | None = None,
    ) -> None:
        super().__init__()
        config.mixing.check_features(in_features, out_features)
        self.config, self.index, self.tasks = config, index, tasks
        self.bank = config.bank.build(in_features, out_features)
        self.core = config.mixing.build(config.bank, tasks)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        elsewhere = config.is_shared or (config.through_block and block_width is None)
        own = None if elsewhere else config.router
        width = config.bank.rank if own and own.projected else block_width or in_features
        self.router = Router(own, width, tasks, config.gates) if own else None
        self.prefer_mixing = False

    @property
    def sums_over_all(self) -> bool:
        """Whether every row sums over all experts, those that are closed to it at weight zero."""
        router = self.config.router
        if router is None or router.most_open is not None:
            return False
        return router.scorer.granularity in (Granularity.TASK, Granularity.TOKEN)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.bank.parameters()).dtype

    def add_to(self, output: Tensor, x: Tensor, context: RoutingContext, adapter: str, layer: str) -> Tensor:
        """Return `output` plus this branch's delta for the inputs `x`.

        Args:
            output: `(..., out_features)` of the frozen linear.
            x: `(..., in_features)`, its input.
        """
        tasks = context.tasks.get(adapter)
        if self.config.through_block:
            chosen = context.running_expert(adapter, layer)
            return self._add_materialised(output, self.dropout(x.to(self.dtype)), chosen, tasks)
        if context.own_experts and tasks is not None and self.config.router is not None:
            decision: Decision | None = own_gates(tasks, self.config.gates)
            return self._add_materialised(output, self.dropout(x.to(self.dtype)), decision, tasks)
        decision = self._decide(x, tasks, context, adapter, layer)
        x = self.dropout(x.to(self.dtype))
        if self.config.granularity == Granularity.TOKEN or (self.prefer_mixing and self.config.mixing.serves_tokens):
            return self._add_mixed(output, x, decision, tasks)
        return self._add_materialised(output, x, decision, tasks)

    def materialise(self, decision: Decision | None, tasks: Tensor | None) -> tuple[Tensor, Tensor]:
        """Build the factors of constant decisions.

        Args:
            decision: on `(decisions, gates)`, or None for an unrouted branch.
            tasks: ids or blends, one per decision.

        Returns:
            `A (decisions, rank, in_features)` and `B (decisions, rank, out_features)`, with the scaling in B, such
            that the delta is `x A^T B`. Experts that are closed for sure take no rank.
        """
        down, up = self.core.materialise(self.bank, decision, tasks)
        return down, up if self.config.scaling == 1 else up * self.config.scaling

    def even_factors(self) -> tuple[Tensor, Tensor]:
        """The factors of the even blend of all experts, as `materialise` gives them; of all tasks, where they differ in
        more than weights."""
        routed = self.config.router
        decision = None if routed is None else routed.even(self.config.gates)
        return self.materialise(decision, torch.full((1, self.tasks), 1 / self.tasks))

    def take_over(self, old: "Branch") -> None:
        """Go on where `old` stands, which knew fewer tasks; what is new stays fresh."""
        copy_corners(old, self)
        if self.router is not None and old.router is not None:
            self.router.take_over(old.router)
        self.train(old.training)

    @torch.no_grad()
    def fit_prototypes(self) -> None:
        """Point each token prototype along what its expert answers to most: the first right-singular vector of its
        delta, found without forming it (Arrow, Ostapenko et al. 2024, section 3.2). No token is pointed to an expert
        that adds nothing here."""
        if self.router is None or not isinstance(self.router.scorer, Prototypes):
            return
        for expert, (down, up) in enumerate(zip(*self.bank.factors(), strict=True)):
            q, r = torch.linalg.qr(down.double().T)
            _, strength, right = torch.linalg.svd(up.double().T @ r.T, full_matrices=False)
            self.router.scorer.directions[expert] = (q @ right[0]).to(down.dtype) * (strength[0] > 0)

    def _decide(
        self, x: Tensor, tasks: Tensor | None, context: RoutingContext, adapter: str, layer: str
    ) -> Decision | None:
        if self.config.router is None:
            return None
        if self.router is None and self.config.granularity == Granularity.TOKEN:
            return context.layer_decision(adapter, self.index, layer, x)
        if self.router is None:
            return context.shared_decision(adapter, self.index)
        decision = self.router(self._projected(x) if self.router.config.projected else x, tasks)
        context.record(router_name(layer, self.index), self.router, decision, x, tasks)
        return decision

    def _projected(self, x: Tensor) -> Tensor:
        down, _ = self.bank.factors()
        with torch.autocast(x.device.type, enabled=False):  # as in scorers, decisions are made in full precision
            return torch.nn.functional.linear(x.to(down.dtype), down[0])

    def _add_mixed(self, output: Tensor, x: Tensor, decision: Decision | None, tasks: Tensor | None) -> Tensor:
        rows = 1 if tasks is None else len(tasks)
        if decision is not None and self.config.granularity < Granularity.TOKEN:
            rows = len(decision.weights)
        elif decision is not None:
            decision = Decision(
                decision.weights.reshape(rows, -1, self.config.gates), decision.scores, decision.probabilities
            )
        hidden, up = self.core.mix(x.reshape(rows, -1, x.shape[-1]), self.bank, decision, tasks)
        if self.config.scaling != 1:
            up = up * self.config.scaling
        return add_product(output, hidden, up)

    def _add_materialised(self, output: Tensor, x: Tensor, decision: Decision | None, tasks: Tensor | None) -> Tensor:
        down, up = self.materialise(decision, tasks)
        if len(down) == 1:
            return add_product(output, torch.nn.functional.linear(x, down[0]), up[0])
        # Beams and flattened tokens of one row lie next to each other, so one reshape serves them all.
        rows = x.reshape(len(down), -1, x.shape[-1])
        hidden = torch.bmm(rows, down.transpose(1, 2))
        if output.dtype != hidden.dtype or torch.is_autocast_enabled(x.device.type):
            return output + torch.bmm(hidden, up).reshape(output.shape).to(output.dtype)
        return torch.baddbmm(output.reshape(len(down), -1, output.shape[-1]), hidden, up).reshape(output.shape)


def add_product(output: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """`output + hidden @ up`, fused where the precisions agree."""
    if output.dtype != hidden.dtype or torch.is_autocast_enabled(output.device.type):
        return output + (hidden @ up).reshape(output.shape).to(output.dtype)
    rows = math.prod(output.shape[:-1])  # not -1, which says nothing where the rank is 0
    return torch.addmm(output.reshape(rows, output.shape[-1]), hidden.reshape(rows, len(up)), up).reshape(output.shape)
