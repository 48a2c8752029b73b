"""Auxiliary losses of routers: frozen configs that are also the function. Padding never counts."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..support.config import config
from .decision import Decision


class RouterLoss(Protocol):
    """What a router pays for its decisions in training, beside the loss of the model."""

    @property
    def weight(self) -> float: ...

    def __call__(self, decision: Decision, mask: Tensor | None, tasks: Tensor | None) -> Tensor:
        """The loss, without its weight, of decisions `(..., gates)` on the tokens of `mask` `(...)`."""
        ...


@config
class BalanceLoss:
    """Switch load balancing; see `balance_loss`."""

    weight: float = 0.01

    def __call__(self, decision: Decision, mask: Tensor | None, tasks: Tensor | None) -> Tensor:
        return balance_loss(decision, mask)


@config
class LocalBalanceLoss:
    """Balance within groups of experts, each drawn to the tasks of its own kind (LoRAMoE, Dou et al. 2023).

    The loss is the squared coefficient of variation of the experts' weights over a sequence, after those of an
    expert of the sequence's kind were scaled by `1 - delta` and those of others by `1 + delta`. It is zero where each
    of the former carries `(1 + delta) / (1 - delta)` times what each of the latter does. The published code takes one
    variation over all sequences of a batch, which also counts how their lengths differ.

    Attributes:
        experts: the kind of each expert.
        tasks: the kind of each task.
    """

    weight: float = 0.1
    delta: float = 0.1
    experts: tuple[int, ...]
    tasks: tuple[int, ...]

    def __call__(self, decision: Decision, mask: Tensor | None, tasks: Tensor | None) -> Tensor:
        rows = decision.weights.flatten(1, -2) if decision.weights.dim() > 2 else decision.weights.unsqueeze(1)
        if mask is not None:
            rows = rows * mask.reshape(len(mask), -1, 1)
        load = rows.sum(1)
        if tasks is not None:
            kinds = torch.tensor(self.tasks, device=load.device)
            named = tasks if tasks.dim() == 1 else tasks.argmax(-1)
            of_row = kinds[named.repeat_interleave(len(load) // len(named))].unsqueeze(-1)
            alike = of_row == torch.tensor(self.experts, device=load.device)
            load = load * torch.where(alike, 1 - self.delta, 1 + self.delta)
        return (load.var(-1, correction=0) / load.mean(-1).square().clamp(min=1e-12)).mean()


@config
class LabelLoss:
    """Cross-entropy between a sequence router's scores and task labels."""

    weight: float = 1.0

    def __call__(self, decision: Decision, mask: Tensor | None, tasks: Tensor | None) -> Tensor:
        assert tasks is not None
        return label_loss(decision, tasks)


@config
class BudgetLoss:
    """How far the mean number of gates that a token opens is from `budget` (DistilWhisper)."""

    weight: float = 1.0
    budget: float = 0.5

    def __call__(self, decision: Decision, mask: Tensor | None, tasks: Tensor | None) -> Tensor:
        opened = masked_mean(decision.probabilities.sum(-1, keepdim=True), mask)
        return (opened.squeeze(-1) - self.budget).abs()


@config
class Penalty:
    """What the normaliser would rather have at zero: an entropy, a number of open gates, a distance from a budget."""

    weight: float = 1e-3

    def __call__(self, decision: Decision, mask: Tensor | None, tasks: Tensor | None) -> Tensor:
        assert decision.penalty is not None
        return masked_mean(decision.penalty.unsqueeze(-1), mask).squeeze(-1)


def balance_loss(decision: Decision, mask: Tensor | None = None) -> Tensor:
    """Switch load-balancing loss: gates times the sum of (share of choices) x (mean probability).

    It is 1 when choices and probabilities are uniform, and rises to the number of gates on collapse
    (Fedus et al. 2021, eq. 4).

    Args:
        decision: weights and probabilities `(..., gates)`.
        mask: `(...)`, true for real tokens.
    """
    opened = masked_mean((decision.weights.detach() != 0).to(decision.probabilities.dtype), mask)
    probability = masked_mean(decision.probabilities, mask)
    return opened.shape[-1] * torch.dot(opened / opened.sum(), probability)


def label_loss(decision: Decision, labels: Tensor) -> Tensor:
    """Cross-entropy between scores `(batch, gates)` and task labels, ids `(batch,)` or shares `(batch, gates)`."""
    return F.cross_entropy(decision.scores.float(), labels)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over all leading dimensions of `(..., features)`, counting only the positions where `mask` is true."""
    if mask is None:
        return values.flatten(0, -2).mean(0)
    weight = mask.to(values.dtype).unsqueeze(-1)
    return (values * weight).flatten(0, -2).sum(0) / weight.sum().clamp(min=1)
