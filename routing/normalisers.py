"""From scores to weights. A normaliser is a frozen config that is also the function; it holds no parameters."""

from typing import Protocol

import torch
from torch import Tensor

from ..support.config import config
from .decision import Decision


class Normaliser(Protocol):
    """Turns scores `(..., gates)` into a `Decision`."""

    @property
    def balance_rate(self) -> float:
        """Step of the selection bias per training step; 0 for normalisers without one."""
        ...

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None) -> Decision: ...

    def max_active(self, gates: int) -> int:
        """The most gates that can be open at once."""
        ...


@config
class Softmax:
    """Every gate is open; `temperature` sharpens (small) or flattens (large) the weights."""

    temperature: float = 1.0
    balance_rate: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("temperature", self.temperature)

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None) -> Decision:
        weights = torch.softmax(scores / self.temperature, dim=-1)
        return Decision(weights, scores, weights)

    def max_active(self, gates: int) -> int:
        return gates


@config
class TopK:
    """The `k` best gates, their softmax weights renormalised to sum to one."""

    k: int = 2
    temperature: float = 1.0
    balance_rate: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("k", self.k)
        _require_positive("temperature", self.temperature)

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None) -> Decision:
        probabilities = torch.softmax(scores / self.temperature, dim=-1)
        kept = _keep_top(probabilities, probabilities, self.k)
        return Decision(kept / kept.sum(-1, keepdim=True), scores, probabilities)

    def max_active(self, gates: int) -> int:
        return min(self.k, gates)


@config
class SigmoidTopK:
    """The `k` best sigmoid scores, rescaled to a mean weight of one over the chosen gates (SMoRA).

    The selection bias decides *which* gates open and never enters their weight: it balances the load without
    changing the function. It moves by `balance_rate` per training step towards the gates used too little.
    """

    k: int = 8
    balance_rate: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("k", self.k)

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None) -> Decision:
        gates = torch.sigmoid(scores)
        ranking = gates.detach() if selection_bias is None else gates.detach() + selection_bias
        kept = _keep_top(gates, ranking, self.k)
        weights = kept * (self.max_active(scores.shape[-1]) / kept.sum(-1, keepdim=True))
        return Decision(weights, scores, gates / gates.sum(-1, keepdim=True))

    def max_active(self, gates: int) -> int:
        return min(self.k, gates)


@config
class Argmax:
    """One gate with weight one. The choice itself has no gradient; train the scores with labels."""

    balance_rate: float = 0.0

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None) -> Decision:
        probabilities = torch.softmax(scores, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
        return Decision(weights, scores, probabilities)

    def max_active(self, gates: int) -> int:
        return 1


def _keep_top(values: Tensor, ranking: Tensor, k: int) -> Tensor:
    """`values` where `ranking` is among the `k` largest of its row, zero elsewhere."""
    if k >= values.shape[-1]:
        return values
    chosen = ranking.topk(k, dim=-1).indices
    return torch.zeros_like(values).scatter(-1, chosen, values.gather(-1, chosen))


def _require_positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} (={value}) must be positive")
