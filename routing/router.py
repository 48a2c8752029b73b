"""A router: scorer, then normaliser, with an optional balancing bias."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .decision import Decision, Granularity
from .normalisers import Normaliser
from .scorers import RouterDims, Scorer


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a branch is routed.

    Attributes:
        scorer: what the weights depend on.
        normaliser: how scores become weights.
        shared: one decision for the whole model instead of one per adapted linear.
        balance_loss: weight of the Switch load-balancing loss, averaged over layers.
        label_loss: weight of the cross-entropy between scores and task labels.
    """

    scorer: Scorer
    normaliser: Normaliser
    shared: bool = False
    balance_loss: float = 0.0
    label_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.shared != (self.scorer.granularity == Granularity.SEQUENCE):
            raise ValueError("a router is shared by the whole model exactly when it decides once per sequence")


class Router(nn.Module):
    """Scores its input and normalises the scores.

    Args:
        config: scorer, normaliser and losses.
        dims: input width, number of tasks and of gates.
    """

    selection_bias: Tensor | None

    def __init__(self, config: RouterConfig, dims: RouterDims) -> None:
        super().__init__()
        self.config = config
        self.scorer = config.scorer.build(dims)
        balanced = config.normaliser.balance_rate > 0
        self.register_buffer("selection_bias", torch.zeros(dims.gates) if balanced else None)
        # Not a buffer: DDP would overwrite each process's counts with those of the first.
        self._load: Tensor | None = None

    @property
    def granularity(self) -> Granularity:
        return self.config.scorer.granularity

    def forward(self, x: Tensor, tasks: Tensor | None) -> Decision:
        """Decide.

        Args:
            x: `(..., in_features)`, tokens or pooled prompts; unused by task tables.
            tasks: `(batch,)` task ids, or None.

        Returns:
            A decision with weights `(..., gates)`, or `(batch, gates)` from a task table.
        """
        return self.config.normaliser(self.scorer(x, tasks), self.selection_bias)

    def count_load(self, weights: Tensor, mask: Tensor | None) -> None:
        """Add which gates opened for the tokens of a training step; `update_selection_biases` uses the counts."""
        if self.selection_bias is None:
            return
        opened = (weights.detach() != 0).to(self.selection_bias.dtype)
        if mask is not None:
            opened = opened * mask.unsqueeze(-1)
        load = opened.flatten(0, -2).sum(0)
        self._load = load if self._load is None else self._load + load

    def take_load(self) -> Tensor | None:
        """The counts since the last call, which are then forgotten; None when nothing was counted."""
        load, self._load = self._load, None
        return load


@torch.no_grad()
def update_selection_biases(routers: Iterable[Router]) -> None:
    """Move each selection bias towards balance, by counts summed over all processes.

    Every process computes the same update from the same global counts, so the biases never drift apart.
    """
    counted = [(router, load) for router in routers if (load := router.take_load()) is not None]
    if not counted:
        return
    loads = torch.cat([load for _, load in counted])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loads)
    for (router, _), load in zip(counted, loads.split([len(load) for _, load in counted]), strict=True):
        assert router.selection_bias is not None
        router.selection_bias += router.config.normaliser.balance_rate * torch.sign(load.mean() - load)
