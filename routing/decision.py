"""What a routing decision is, and how fine it is."""

from dataclasses import dataclass
from enum import IntEnum

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
        scores: `(..., gates)`, raw scores before normalisation.
        probabilities: `(..., gates)`, the soft distribution behind the weights; rows sum to one.
    """

    weights: Tensor
    scores: Tensor
    probabilities: Tensor
