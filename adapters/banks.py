"""Banks: how the low-rank factors of the experts are stored, tied and initialised.

Whatever a bank stores, `factors()` gives it as dense factors stacked over experts, `(experts, rank, features)`, so that
joining all experts into one product is a view, not a copy. The delta is zero at the start.
"""

import math
from collections.abc import Iterable
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..support.config import config

Shape = tuple[int, int]
"""The sizes `(in_features, out_features)` of a linear."""


class Bank(nn.Module):
    """The experts of one adapted linear."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """`A (experts, rank, in_features)`, or `(1, rank, in_features)` where all share it, and
        `B (experts, rank, out_features)`."""
        raise NotImplementedError

    def blended(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mix what the experts are made of before it becomes factors; for banks with `inner_gates`.

        Args:
            weights: `(decisions, inner_gates)`.

        Returns:
            `A (decisions, rank, in_features)` and `B (decisions, rank, out_features)`.
        """
        raise NotImplementedError

    def share(self, common: "Common") -> None:
        """Take what the banks of all layers have in common; for banks whose config builds something."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Make the experts new, as far as they are not in common."""
        raise NotImplementedError


class Common(nn.Module):
    """What the banks of all layers have in common, and the hub holds.

    `codes` are the names of its parameters whose rows stand for tasks, or for something tasks have.
    """

    codes: ClassVar[tuple[str, ...]]

    def reset_parameters(self) -> None:
        """Make what is in common new."""
        raise NotImplementedError


class BankConfig(Protocol):
    """Builds a bank.

    Attributes:
        experts: number of low-rank experts.
        rank: rank of each expert.
        shared_down: whether all experts share one A.
        inner_gates: number of weights that mix what experts are made of; None where they are dense factors.
    """

    @property
    def experts(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def shared_down(self) -> bool: ...
    @property
    def inner_gates(self) -> int | None: ...
    def build(self, in_features: int, out_features: int) -> Bank: ...
    def common(self, shapes: Iterable[Shape]) -> Common | None:
        """What the banks of all linears of these shapes have in common; None where there is nothing."""
        ...


class _Separate:
    """What banks say that share nothing."""

    @property
    def inner_gates(self) -> int | None:
        return None

    def common(self, shapes: Iterable[Shape]) -> Common | None:
        return None


@config
class Dense(_Separate):
    """Experts as dense factors, each its own or with one A for all (HydraLoRA).

    `output_scale` adds a trainable scale per expert and output unit, zero at the start; A and B are then both random
    (MultiLoRA).
    """

    experts: int = 1
    rank: int = 8
    shared_down: bool = False
    output_scale: bool = False

    def __post_init__(self) -> None:
        require_positive(experts=self.experts, rank=self.rank)

    def build(self, in_features: int, out_features: int) -> "DenseBank":
        return DenseBank(self, in_features, out_features)


@config
class TensorProduct(_Separate):
    """Every factor row is a Kronecker product of `order` short leaves, cut to length (TensorPoly, Su et al. 2024).

    An expert takes `order * rank * (in_features^(1/order) + out_features^(1/order))` numbers instead of
    `rank * (in_features + out_features)`.
    """

    experts: int = 1
    rank: int = 8
    order: int = 2
    shared_down: bool = False

    def __post_init__(self) -> None:
        require_positive(experts=self.experts, rank=self.rank)
        if not 2 <= self.order <= 4:
            raise ValueError(f"order (={self.order}) must be 2, 3 or 4: products of more numbers lose precision")

    @property
    def inner_gates(self) -> int:
        return self.order * self.experts

    def build(self, in_features: int, out_features: int) -> "TensorProductBank":
        return TensorProductBank(self, in_features, out_features)


@config
class TensorTrain(_Separate):
    """One expert whose A and B are tensor trains over `order` modes of the features and one of the rank (LoRETTA)."""

    rank: int = 8
    train_rank: int = 5
    order: int = 3
    experts: int = 1
    shared_down: bool = False

    def __post_init__(self) -> None:
        require_positive(rank=self.rank, train_rank=self.train_rank, order=self.order)
        if self.experts != 1:
            raise ValueError(f"experts (={self.experts}) must be 1: a tensor train is one expert")

    def build(self, in_features: int, out_features: int) -> "TensorTrainBank":
        return TensorTrainBank(self, in_features, out_features)


@config
class Cored(_Separate):
    """One A and one B for all experts; an expert is the small matrix between them (CoMoL)."""

    experts: int = 1
    rank: int = 8
    shared_down: bool = True

    def __post_init__(self) -> None:
        require_positive(experts=self.experts, rank=self.rank)

    def build(self, in_features: int, out_features: int) -> "CoredBank":
        return CoredBank(self, in_features, out_features)


class DenseBank(Bank):
    """Shapes: `down (experts or 1, rank, in_features)`, `up (experts, rank, out_features)` and, where there is one,
    `scale (experts, out_features)`."""

    def __init__(self, config: Dense, in_features: int, out_features: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(1 if config.shared_down else config.experts, config.rank, in_features))
        self.up = nn.Parameter(torch.empty(config.experts, config.rank, out_features))
        self.scale = nn.Parameter(torch.empty(config.experts, out_features)) if config.output_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LoRA's initialisation, expert by expert."""
        for matrix in self.down:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        if self.scale is None:
            nn.init.zeros_(self.up)
        else:
            nn.init.zeros_(self.scale)
            # B is drawn as LoRA would draw an (out_features, rank) matrix: its fan-in is the rank.
            nn.init.uniform_(self.up, -1 / math.sqrt(self.up.shape[1]), 1 / math.sqrt(self.up.shape[1]))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.up if self.scale is None else self.up * self.scale.unsqueeze(1)


class TensorProductBank(Bank):
    """Shapes: `down (order, experts, rank, in_leaf)` and `up (order, experts, rank, out_leaf)`.

    The last leaf of B is zero at the start, so the delta is, and its gradient is not.
    """

    def __init__(self, config: TensorProduct, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (config.order, config.experts, config.rank)
        self.down = nn.Parameter(torch.empty(*shape, _root(in_features, config.order)))
        self.up = nn.Parameter(torch.empty(*shape, _root(out_features, config.order)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Products of leaves get the spread of LoRA's A."""
        bound = (1 / math.sqrt(3 * self.in_features)) ** (1 / len(self.down)) * math.sqrt(3)
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.uniform_(self.up[:-1].data, -math.sqrt(3), math.sqrt(3))
        nn.init.zeros_(self.up[-1].data)

    def factors(self) -> tuple[Tensor, Tensor]:
        return _product(self.down, self.in_features), _product(self.up, self.out_features)

    def blended(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the leaves of all experts before their product, each order by weights of its own."""
        weights = weights.unflatten(-1, (len(self.down), -1))
        down, up = (torch.einsum("noe,oerm->onrm", weights, leaves) for leaves in (self.down, self.up))
        return _product(down, self.in_features), _product(up, self.out_features)


class TensorTrainBank(Bank):
    """Shapes: cores `(train_rank, mode, train_rank)`, the first and the last of them with an outer rank of 1.

    The last core of B, which carries the rank, is zero at the start.
    """

    def __init__(self, config: TensorTrain, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.down = self._cores(config, in_features)
        self.up = self._cores(config, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A gets the spread of LoRA's A."""
        for cores, spread in ((self.down, 1 / math.sqrt(3 * self.in_features)), (self.up, 1.0)):
            inner = cores[0].shape[-1]
            # An entry is a sum over the inner ranks of products of one number of every core.
            deviation = (spread / inner ** ((len(cores) - 1) / 2)) ** (1 / len(cores))
            for core in cores:
                nn.init.normal_(core, std=deviation)
        nn.init.zeros_(self.up[-1])

    def factors(self) -> tuple[Tensor, Tensor]:
        down, up = _contract(self.down, self.in_features), _contract(self.up, self.out_features)
        return down.unsqueeze(0), up.unsqueeze(0)

    @staticmethod
    def _cores(config: TensorTrain, features: int) -> nn.ParameterList:
        modes = [*[_root(features, config.order)] * config.order, config.rank]
        ranks = [1, *[config.train_rank] * config.order, 1]
        shapes = zip(ranks, modes, ranks[1:], strict=False)
        return nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)


class CoredBank(Bank):
    """Shapes: `down (1, rank, in_features)`, `cores (experts, rank, rank)`, `up (rank, out_features)`."""

    def __init__(self, config: Cored, in_features: int, out_features: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(1, config.rank, in_features))
        self.cores = nn.Parameter(torch.empty(config.experts, config.rank, config.rank))
        self.up = nn.Parameter(torch.empty(config.rank, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LoRA's A and B, and cores near the identity that differ, so that experts can part."""
        nn.init.kaiming_uniform_(self.down[0].data, a=math.sqrt(5))
        nn.init.zeros_(self.up)
        nn.init.normal_(self.cores, std=0.02)
        with torch.no_grad():
            self.cores.add_(torch.eye(self.cores.shape[-1], device=self.cores.device))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.down, self.cores @ self.up


def joined(factor: Tensor) -> Tensor:
    """`(experts, rank, features)` as one factor of rank `experts * rank`; free of copies."""
    return factor.flatten(0, 1)


def require_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} (={value}) must be at least 1")


def _root(features: int, order: int) -> int:
    """The smallest leaf whose `order`-fold product has `features` entries or more."""
    leaf = max(1, round(features ** (1 / order)) - 1)
    while leaf**order < features:
        leaf += 1
    return leaf


def _product(leaves: Tensor, features: int) -> Tensor:
    """`(order, n, rank, leaf)` to `(n, rank, features)`: Kronecker products, cut to length."""
    result = leaves[0]
    for leaf in leaves[1:]:
        result = (result.unsqueeze(-1) * leaf.unsqueeze(-2)).flatten(-2)
    return result[..., :features]


def _contract(cores: nn.ParameterList, features: int) -> Tensor:
    """A tensor train as `(rank, features)`, cut to length."""
    result = cores[0]
    for core in list(cores)[1:-1]:
        result = torch.tensordot(result, core, dims=1).flatten(1, 2)
    return torch.tensordot(result[0, :features], cores[-1].squeeze(-1), dims=1).T
