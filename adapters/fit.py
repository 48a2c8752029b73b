"""Fitting one plain LoRA to a layer whose experts are chosen token by token.

No plain LoRA equals such a layer; the best one for a task's own inputs is the solution of a weighted least-squares
problem, and a short distillation on the model's outputs repairs what the layers' errors add up to. The mean of the
gates is no export: it took a pilot from .99 to .36.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .fidelity import answer_logits, token_kl
from .hub import LoramuxModel, TaskOrBlend
from .low_rank import LowRank, rank_class

Batch = Mapping[str, Tensor]
_STATISTICS_BYTES = 2 * 2**30
_RIDGE = 1e-4


@torch.no_grad()
def fit_factors(
    hub: LoramuxModel, task: TaskOrBlend, batches: Sequence[Batch], rank: int | None = None
) -> dict[str, LowRank]:
    """The best static LoRA of every layer for the inputs of one task.

    With `C = E[x x^T]` and `W = E[d x^T] C^-1` over the task's tokens, the truncated SVD of `W C^1/2` gives the map of
    rank `rank` with the least expected squared error of the delta `d`, not limited to the span of the experts.

    Args:
        batches: the task's examples (`input_ids`, `attention_mask`, `labels`); 20 tokens per input feature or more.
        rank: of the result; by default the class that holds the experts of a layer together.
    """
    factors: dict[str, LowRank] = {}
    for group in _affordable_groups(hub):
        moments = {name: _Moments() for name in group}
        for batch in batches:
            _observe(hub, task, batch, moments)
        for name, moment in moments.items():
            factors[name] = moment.solve(rank or _total_rank(hub, name))
    return factors


def distil(
    hub: LoramuxModel,
    task: TaskOrBlend,
    batches: Sequence[Batch],
    factors: dict[str, LowRank],
    *,
    steps: int,
    learning_rate: float = 1e-3,
) -> dict[str, LowRank]:
    """Move `factors` towards the routed model's answers, by the divergence of their answer-token distributions."""
    trained = {
        name: LowRank(pair.down.clone().requires_grad_(), pair.up.clone().requires_grad_())
        for name, pair in factors.items()
    }
    leaves = [leaf for pair in trained.values() for leaf in (pair.down, pair.up)]
    optimizer = torch.optim.AdamW(leaves, learning_rate, weight_decay=0.0)
    for step in range(steps):
        batch = batches[step % len(batches)]
        with torch.no_grad(), hub.routing(task):
            target = answer_logits(hub, batch)
        with hub.using_factors(trained), torch.enable_grad():
            loss = token_kl(target, answer_logits(hub, batch)).mean()
        optimizer.zero_grad()
        loss.backward(inputs=leaves)
        optimizer.step()
    return {name: LowRank(pair.down.detach(), pair.up.detach()) for name, pair in trained.items()}


class _Moments:
    """Running `E[x x^T]` and `E[d x^T]` of one layer, in float64."""

    def __init__(self) -> None:
        self.xx: Tensor | None = None
        self.dx: Tensor | None = None
        self.count = 0.0

    def add(self, x: Tensor, delta: Tensor, counts: Tensor | None) -> None:
        """Add tokens `x (..., in_features)` and their deltas `(..., out_features)`, each as much as it counts."""
        x, delta = x.flatten(0, -2).double(), delta.flatten(0, -2).double()
        if counts is not None:
            counts = counts.flatten().to(x)
            keep = counts > 0
            x, delta, counts = x[keep], delta[keep], counts[keep]
            root = counts.sqrt().unsqueeze(-1)
            x, delta = x * root, delta * root
        if self.xx is None or self.dx is None:
            self.xx, self.dx = x.T @ x, delta.T @ x
        else:
            self.xx += x.T @ x
            self.dx += delta.T @ x
        self.count += len(x) if counts is None else float(counts.sum())

    def solve(self, rank: int) -> LowRank:
        assert self.xx is not None
        assert self.dx is not None
        covariance, cross = self.xx / self.count, self.dx / self.count
        ridge = _RIDGE * covariance.trace() / len(covariance)
        values, vectors = torch.linalg.eigh(covariance + ridge * torch.eye(len(covariance)).to(covariance))
        inverse_root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
        u, s, v = torch.linalg.svd(cross @ inverse_root, full_matrices=False)
        rank = min(rank, len(s))
        return LowRank((v[:rank] @ inverse_root).float(), (u[:, :rank] * s[:rank]).float())


def _observe(hub: LoramuxModel, task: TaskOrBlend, batch: Batch, moments: dict[str, _Moments]) -> None:
    def add(layer: str, x: Tensor, delta: Tensor, counts: Tensor | None) -> None:
        if layer in moments:
            moments[layer].add(x, delta, counts)

    with hub.routing(task), hub.observing(add):
        answer_logits(hub, batch)


def _affordable_groups(hub: LoramuxModel) -> Iterator[list[str]]:
    """Layers in groups whose statistics fit in memory together; each group costs one pass over the inputs."""
    group: list[str] = []
    used = 0
    for name, layer in hub.layers().items():
        size = 8 * layer.in_features * (layer.in_features + layer.out_features)
        if group and used + size > _STATISTICS_BYTES:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    yield group


def _total_rank(hub: LoramuxModel, layer: str) -> int:
    banks: Iterable = (branch.config.bank for branch in hub.layers()[layer].branches(hub.active_adapters[0]))
    return rank_class(sum(bank.experts * bank.rank for bank in banks))
