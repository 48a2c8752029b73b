"""From scores to weights. A normaliser is a frozen config that is also the function; it holds no parameters."""

import math

import torch
from torch import Tensor

from ..support.config import config
from .decision import Decision

_LEAST_MASS = 0.01
"""On codes that name a gate; below it a penalty does not grow further."""


class Normaliser:
    """Turns scores into a `Decision`. Subclasses are configs; what they leave out is as here."""

    @property
    def bias_step(self) -> float:
        """How far the selection bias moves per training step; 0 for normalisers without one."""
        return 0.0

    @property
    def closed_score(self) -> float:
        """A score at which a gate is shut, whatever the others score."""
        return -1e4

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        """Decide on scores `(..., scores)`; only in training may chance take part."""
        raise NotImplementedError

    def even_weight(self, gates: int) -> float:
        """The weight of each of so many gates where none is preferred."""
        return 1 / gates

    def num_scores(self, gates: int) -> int:
        """How many scores it takes to weight so many gates."""
        return gates


@config
class Identity(Normaliser):
    """The scores are the weights."""

    @property
    def closed_score(self) -> float:
        return 0.0

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        return Decision(scores, scores, scores)


@config
class Softmax(Normaliser):
    """Every gate is open; `temperature` sharpens (small) or flattens (large) the weights."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("temperature", self.temperature)

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        weights = torch.softmax(scores / self.temperature, dim=-1)
        return Decision(weights, scores, weights)


@config
class TopK(Normaliser):
    """The `k` best gates, their softmax weights renormalised to sum to one."""

    k: int = 2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("k", self.k)
        _require_positive("temperature", self.temperature)

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        probabilities = torch.softmax(scores / self.temperature, dim=-1)
        kept = _keep_top(probabilities, probabilities, self.k)
        return Decision(kept / kept.sum(-1, keepdim=True), scores, probabilities, active=_at_most(self.k, scores))


@config
class SigmoidTopK(Normaliser):
    """The `k` best sigmoid scores, rescaled to a mean weight of one over the chosen gates (SMoRA).

    The selection bias decides *which* gates open and never enters their weight: it balances the load without
    changing the function. It moves by `balance_rate` per training step towards the gates used too little.
    """

    k: int = 8
    balance_rate: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("k", self.k)

    @property
    def bias_step(self) -> float:
        return self.balance_rate

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        gates = torch.sigmoid(scores)
        ranking = gates.detach() if selection_bias is None else gates.detach() + selection_bias
        kept = _keep_top(gates, ranking, self.k)
        active = _at_most(self.k, scores)
        weights = kept * (active / kept.sum(-1, keepdim=True))
        return Decision(weights, scores, gates / gates.sum(-1, keepdim=True), active=active)

    def even_weight(self, gates: int) -> float:
        return min(self.k, gates) / gates


@config
class Argmax(Normaliser):
    """One gate with weight one. The choice itself has no gradient; train the scores with labels."""

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        probabilities = torch.softmax(scores, dim=-1)
        return Decision(_one_hot_of_best(scores), scores, probabilities, active=1)


@config
class GumbelSoftmax(Normaliser):
    """A sampled softmax in training, the softmax itself in evaluation; `hard` takes one gate, straight through."""

    temperature: float = 1.0
    hard: bool = False

    def __post_init__(self) -> None:
        _require_positive("temperature", self.temperature)

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        noisy = scores - torch.empty_like(scores).exponential_().log() if training else scores
        soft = torch.softmax(noisy / self.temperature, dim=-1)
        if not self.hard:
            return Decision(soft, scores, soft)
        # In training closed gates are computed too: their gradient is what opens them.
        weights = straight_through(_one_hot_of_best(soft), soft)
        return Decision(weights, scores, soft, active=None if training else 1)


@config
class SigmoidShare(Normaliser):
    """Every gate opens by itself, and the open ones share a weight of one (Poly).

    `sampled` draws each gate from a relaxed Bernoulli distribution of `temperature` in training.
    """

    sampled: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("temperature", self.temperature)

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        if self.sampled and training:
            uniform = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
            gates = torch.sigmoid((scores + torch.logit(uniform)) / self.temperature)
        else:
            gates = torch.sigmoid(scores)
        weights = gates / gates.sum(-1, keepdim=True).clamp(min=1e-12)
        return Decision(weights, scores, weights)


@config
class DSelectK(Normaliser):
    """At most `k` gates, each chosen by a binary code of smooth steps: sparse in the end, smooth on the way.

    The scores are `k` codes of `ceil(log2 gates)` numbers, then the logits of the `k` selectors. The penalty, zero once
    every selector has settled on a gate, is their entropy and, where codes are left over that name no gate, the
    reciprocal of the mass on those that do (Hazimeh et al. 2021, sections 3 and 4).

    `gamma` is the width of the smooth step; outside of it a code is exactly 0 or 1.
    """

    k: int = 2
    gates: int
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("k", self.k)
        _require_positive("gamma", self.gamma)

    @property
    def bits(self) -> int:
        return math.ceil(math.log2(self.gates))

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        codes, logits = scores.split([self.k * self.bits, self.k], dim=-1)
        step = smooth_step(codes.unflatten(-1, (self.k, 1, self.bits)), self.gamma)
        named = torch.arange(2**self.bits, device=scores.device)
        bit = (named[:, None] >> torch.arange(self.bits, device=scores.device)) & 1
        selectors = torch.where(bit.bool(), step, 1 - step).prod(-1)
        valid = selectors[..., : self.gates]
        chosen = torch.softmax(logits, dim=-1).unsqueeze(-1) * valid
        entropy = -(selectors * selectors.clamp(min=1e-12).log()).sum(-1)
        unnamed = 1 / valid.sum(-1).clamp(min=_LEAST_MASS) - 1
        penalty = (entropy + unnamed).sum(-1)
        weights = chosen.sum(-2)
        return Decision(weights, scores, weights, penalty)

    def num_scores(self, gates: int) -> int:
        return self.k * self.bits + self.k


@config
class Threshold(Normaliser):
    """A gate is on, with weight one, where its score is at least `at`; the gradient passes straight through (TAPS).

    The penalty is the sum of the scores' sizes.
    """

    at: float = 0.1

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        opened = (scores >= self.at).to(scores.dtype)
        return Decision(straight_through(opened, scores), scores, opened, scores.abs().sum(-1))


@config
class RandomOne(Normaliser):
    """One gate at random, the same for the whole batch, in training; all of them in evaluation (MoSA).

    The one stands for all: its weight is their number, as with dropout, or together they would say in evaluation as
    many times too much as there are gates.
    """

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        gates = scores.shape[-1]
        if not training:
            weights = torch.ones_like(scores)
            return Decision(weights, scores, weights / gates)
        chosen = torch.randint(gates, (1,), device=scores.device)
        probabilities = torch.zeros_like(scores).index_fill(-1, chosen, 1.0)
        return Decision(gates * probabilities, scores, probabilities, active=1)

    def even_weight(self, gates: int) -> float:
        return 1.0


@config
class NoisyStep(Normaliser):
    """Use a gate or not: a sigmoid under noise in training, a hard step at zero in evaluation (DistilWhisper).

    `noise` is the deviation of the noise, which drives the scores away from zero.
    """

    noise: float = 1.0

    def __call__(self, scores: Tensor, selection_bias: Tensor | None = None, training: bool = False) -> Decision:
        soft = torch.sigmoid(scores + self.noise * torch.randn_like(scores) if training else scores)
        return Decision(soft if training else (scores >= 0).to(scores.dtype), scores, soft)


def smooth_step(values: Tensor, gamma: float) -> Tensor:
    """0 below -gamma/2, 1 above gamma/2, exactly, and a cubic with flat ends between."""
    t = (values / gamma).clamp(-0.5, 0.5)
    return -2 * t**3 + 1.5 * t + 0.5


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard` with the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())  # in this order the value is `hard` to the last bit


def _keep_top(values: Tensor, ranking: Tensor, k: int) -> Tensor:
    """`values` where `ranking` is among the `k` largest of its row, zero elsewhere."""
    if k >= values.shape[-1]:
        return values
    chosen = ranking.topk(k, dim=-1).indices
    return torch.zeros_like(values).scatter(-1, chosen, values.gather(-1, chosen))


def _at_most(k: int, scores: Tensor) -> int:
    return min(k, scores.shape[-1])


def _one_hot_of_best(scores: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)


def _require_positive(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} (={value}) must be positive")
