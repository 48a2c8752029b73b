"""A router: scorer, then normaliser, with an optional balancing bias."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .decision import Decision, Granularity
from .losses import LabelLoss, RouterLoss
from .normalisers import Normaliser
from .scorers import FirstPass, FixedTable, RouterDims, Scorer


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a branch is routed.

    Attributes:
        scorer: what the weights depend on.
        normaliser: how scores become weights.
        shared: one router for the whole model instead of one per adapted linear.
        projected: it reads what the A that all experts share makes of a token, instead of the token (CoMoL).
        per_block: one router for all linears of a feed-forward block, at its input; experts are mixed after it.
        groups: number of independent decisions side by side, each over its share of the gates (MHR's splits).
        losses: what decisions cost in training, averaged over layers.
    """

    scorer: Scorer
    normaliser: Normaliser
    shared: bool = False
    per_block: bool = False
    projected: bool = False
    groups: int = 1
    losses: tuple[RouterLoss, ...] = ()

    def __post_init__(self) -> None:
        if self.scorer.granularity == Granularity.SEQUENCE and not self.shared:
            raise ValueError("a router that decides once per sequence must be shared by the whole model")
        if self.scorer.granularity == Granularity.TOKEN and self.shared != isinstance(self.scorer, FirstPass):
            raise ValueError("a router of tokens is shared by the whole model if it reads a first pass, and only then")
        if self.per_block and (self.scorer.granularity != Granularity.TOKEN or self.shared):
            raise ValueError("the router of a feed-forward block decides token by token, and for that block alone")

    @property
    def learns_labels(self) -> bool:
        return any(isinstance(loss, LabelLoss) for loss in self.losses)

    @property
    def most_open(self) -> int | None:
        """The most gates that are open to one task, where a given table says so."""
        if not isinstance(self.scorer, FixedTable) or self.normaliser.closed_score != 0 or self.groups > 1:
            return None
        return self.scorer.most_open

    def even(self, gates: int) -> Decision:
        """What is decided where no gate is preferred, on `(1, gates)`."""
        weights = torch.full((1, gates), self.normaliser.even_weight(gates // self.groups))
        return Decision(weights, weights, weights)

    def num_scores(self, gates: int) -> int:
        return self.groups * self.normaliser.num_scores(gates // self.groups)

    def loss(self, decision: Decision, mask: Tensor | None, tasks: Tensor | None) -> Tensor | None:
        """The weighted sum of the losses of decisions; None where there are none."""
        parts = [loss.weight * loss(decision, mask, tasks) for loss in self.losses if loss.weight]
        return torch.stack(parts).sum() if parts else None


class Router(nn.Module):
    """Scores its input and normalises the scores.

    Args:
        config: scorer, normaliser and losses.
        in_features: width of what it reads.
        tasks, gates: their numbers.
        layers: how many layers it decides for, where it reads a first pass.

    Attributes:
        is_frozen: whether a stage trains what is routed and not the router, which then draws nothing at random.
    """

    selection_bias: Tensor | None

    def __init__(self, config: RouterConfig, in_features: int, tasks: int, gates: int, layers: int = 1) -> None:
        super().__init__()
        self.config, self.gates = config, gates
        self.is_frozen = False
        self.scorer = config.scorer.build(RouterDims(in_features, tasks, config.num_scores(gates), layers))
        balanced = config.normaliser.bias_step > 0
        self.register_buffer("selection_bias", torch.zeros(gates) if balanced else None)
        # Not a buffer: DDP would overwrite each process's counts with those of the first.
        self._load: Tensor | None = None

    @property
    def granularity(self) -> Granularity:
        return self.config.scorer.granularity

    def forward(self, x: Tensor, tasks: Tensor | None) -> Decision:
        """Decide.

        Args:
            x: `(..., in_features)`, tokens or pooled prompts; unused by task tables.
            tasks: `(batch,)` task ids, `(batch, tasks)` blends of tasks, or None.

        Returns:
            A decision with weights `(..., gates)`, `(batch, gates)` from a task table, or `(layers, ..., gates)` where
            it decides for all layers at once.
        """
        return self._decide(x, tasks, self.training and not self.is_frozen)

    def settled(self, tasks: Tensor | None) -> Decision:
        """What is decided for tasks, on `(batch, gates)`, where chance takes no part and no input is read."""
        return self._decide(torch.empty(0), tasks, False)

    @torch.no_grad()
    def take_over(self, old: "Router") -> None:
        """Go on where `old` stands, which knew fewer tasks. Gates it did not have stay closed to the tasks it knew."""
        copy_corners(old, self)
        self.train(old.training)
        for name, parameter in self.named_parameters() if self.config.scorer.is_task_logits else ():
            before = old.get_parameter(name)
            if before.dim() == 2:
                parameter[: len(before), before.shape[1] :] = self.config.normaliser.closed_score

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

    def _decide(self, x: Tensor, tasks: Tensor | None, training: bool) -> Decision:
        if tasks is not None and tasks.dim() == 2 and self.config.scorer.needs_task:
            return self._blend(x, tasks, training)
        decision = self._normalise(self.scorer(x, tasks), training)
        most = self.config.most_open
        return decision if most is None else replace(decision, active=most)

    def _blend(self, x: Tensor, shares: Tensor, training: bool) -> Decision:
        """What every task decides alone, mixed by shares `(batch, tasks)`."""
        rows, count = shares.shape
        tasks = torch.arange(count, device=shares.device)
        if self.granularity < Granularity.TOKEN:
            return self._decide(x, tasks, training).mapped(lambda part: shares.to(part.dtype) @ part)
        repeated = x.repeat(count, *[1] * (x.dim() - 1))
        alone = self._decide(repeated, tasks.repeat_interleave(rows), training)

        def mixed(part: Tensor) -> Tensor:
            by_task = part.reshape(count, rows, -1)
            sums = torch.einsum("nt,tnr->nr", shares.to(part.dtype), by_task)
            return sums.reshape(len(x), *part.shape[1:])

        return alone.mapped(mixed)

    def _normalise(self, scores: Tensor, training: bool) -> Decision:
        if self.config.groups == 1:
            return self.config.normaliser(scores, self.selection_bias, training)
        decision = self.config.normaliser(scores.unflatten(-1, (self.config.groups, -1)), None, training)
        penalty = decision.penalty.sum(-1) if decision.penalty is not None else None
        return Decision(decision.weights.flatten(-2), scores, decision.probabilities.flatten(-2), penalty)


@torch.no_grad()
def copy_corners(old: nn.Module, new: nn.Module) -> None:
    """Copy every saved tensor of `old` into the leading corner of its namesake in `new`, which is no smaller."""
    grown = new.state_dict()
    for name, tensor in old.state_dict().items():
        grown[name][tuple(slice(size) for size in tensor.shape)] = tensor


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
        router.selection_bias += router.config.normaliser.bias_step * torch.sign(load.mean() - load)
