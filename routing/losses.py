"""Auxiliary losses of routers. Padding never counts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .decision import Decision


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
    """Cross-entropy between a sequence router's scores `(batch, gates)` and task labels `(batch,)`."""
    return F.cross_entropy(decision.scores.float(), labels)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over all leading dimensions of `(..., features)`, counting only the positions where `mask` is true."""
    if mask is None:
        return values.flatten(0, -2).mean(0)
    weight = mask.to(values.dtype).unsqueeze(-1)
    return (values * weight).flatten(0, -2).sum(0) / weight.sum().clamp(min=1)
