"""What a routing decision is, and how fine it is."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Granularity(IntEnum):
    """What the weights of a router depend on; a coarser decision can be cached and exported exactly."""

    FIXED = 0
    TASK = 1
    SEQUENCE = 2
    TOKEN = 3


@dataclass(frozen=True)
class Decision:
    """The weights a router gives its gates.

    Attributes:
        weights: `(..., gates)`, zero where a gate is closed.
        scores: `(..., scores)`, raw scores before normalisation.
        probabilities: `(..., gates)`, the soft distribution behind the weights; rows sum to one where the normaliser
            makes a distribution.
        penalty: `(...)`, what the normaliser would rather have at zero (an entropy, a size); None where it is content.
        active: the most gates that are open at once; None where all may be.
    """

    weights: Tensor
    scores: Tensor
    probabilities: Tensor
    penalty: Tensor | None = None
    active: int | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Decision":
        """The decision with every part changed alike, and any gate open."""
        penalty = None if self.penalty is None else change(self.penalty)
        return Decision(change(self.weights), change(self.scores), change(self.probabilities), penalty)


def own_gates(tasks: Tensor, gates: int) -> Decision:
    """Every row takes the gate of its own task, or blends the gates as its tasks are blended.

    Args:
        tasks: ids `(batch,)` or blends `(batch, tasks)`; there is one gate per task.
    """
    if tasks.dim() == 2:
        return Decision(tasks, tasks, tasks)
    shares = torch.nn.functional.one_hot(tasks, gates).float()
    return Decision(shares, shares, shares, active=1)
