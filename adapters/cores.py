"""Cores: where the weights of a router act between A and B.

Every core knows two ways of computing the same function. `mix` runs all experts on every token and weights what they
say; it serves every granularity. `materialise` first builds the factors of each decision; it serves every decision that
is constant over tokens, and is what an exact export writes down.
"""

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routing import Decision
from ..routing.scorers import rows_of
from ..support.config import config
from .banks import Bank, BankConfig, joined

Factors = tuple[Tensor, Tensor]


class Core(nn.Module):
    """Decisions are on `(decisions, gates)`, or `(..., gates)` token by token; None where all experts are on."""

    def materialise(self, bank: Bank, decision: Decision | None, tasks: Tensor | None) -> Factors:
        """`A (decisions, rank, in_features)` and `B (decisions, rank, out_features)` of constant decisions, such that
        the delta is `x A^T B`. Experts that are closed for sure take no rank."""
        raise NotImplementedError

    def mix(self, x: Tensor, bank: Bank, decision: Decision | None, tasks: Tensor | None) -> Factors:
        """Weighted activations `(..., rank)` of inputs `(rows, tokens, in_features)` and the factor `(rank,
        out_features)` that turns them into the delta."""
        raise NotImplementedError


class CoreConfig(Protocol):
    @property
    def serves_tokens(self) -> bool:
        """Whether weights may differ from token to token."""
        ...

    @property
    def needs_task(self) -> bool:
        """Whether a call that names no task is an error."""
        ...

    def num_gates(self, bank: BankConfig) -> int:
        """How many weights the router gives.

        Raises:
            ValueError: when the core cannot work on such a bank.
        """
        ...

    def expert_rank(self, bank: BankConfig) -> int:
        """The rank of what one weight of the router acts on."""
        ...

    def build(self, bank: BankConfig, tasks: int) -> Core: ...

    def check_features(self, in_features: int, out_features: int) -> None:
        """Raise ValueError when a linear of these sizes cannot be served."""
        ...


class _AnyCore:
    """What most cores say."""

    @property
    def serves_tokens(self) -> bool:
        return True

    @property
    def needs_task(self) -> bool:
        return False

    def expert_rank(self, bank: BankConfig) -> int:
        return bank.rank

    def check_features(self, in_features: int, out_features: int) -> None:
        pass


@config
class OutputMix(_AnyCore):
    """The delta is the weighted sum of the experts' deltas.

    `block_size` adjacent ranks share one weight. None means the rank of an expert; 1 makes every rank an expert of its
    own (SMoRA).
    """

    block_size: int | None = None

    def num_gates(self, bank: BankConfig) -> int:
        total = bank.experts * bank.rank
        if bank.shared_down:
            raise ValueError("experts that share A are mixed by HeadMix")
        if self.block_size is not None and (self.block_size < 1 or total % self.block_size):
            raise ValueError(f"block_size (={self.block_size}) must divide the total rank (={total})")
        return total // self.expert_rank(bank)

    def expert_rank(self, bank: BankConfig) -> int:
        return self.block_size or bank.rank

    def build(self, bank: BankConfig, tasks: int) -> Core:
        return _OutputMix(self.num_gates(bank))


@config
class HeadMix(_AnyCore):
    """Experts share A; the weighted sum is of their B. Rank stays that of one expert.

    `task_matrix` puts a trainable matrix per task between A and B, the identity at the start (MTL-LoRA).
    """

    task_matrix: Literal["full", "diagonal"] | None = None

    @property
    def needs_task(self) -> bool:
        return self.task_matrix is not None

    def num_gates(self, bank: BankConfig) -> int:
        if not bank.shared_down:
            raise ValueError("HeadMix is for experts that share A")
        return bank.experts

    def build(self, bank: BankConfig, tasks: int) -> Core:
        return _HeadMix(_task_matrices(self.task_matrix, tasks, bank.rank))


@config
class FactorMix(_AnyCore):
    """The factors themselves are averaged: `(sum_e w_e B_e)(sum_e w_e A_e)`, rank that of one expert (Poly).

    With `splits`, every one of so many blocks of inputs, and of outputs, has weights of its own (MHR).
    """

    splits: int = 1

    def num_gates(self, bank: BankConfig) -> int:
        if bank.shared_down:
            raise ValueError("experts that share A are mixed by HeadMix")
        return self.splits * bank.experts

    def check_features(self, in_features: int, out_features: int) -> None:
        if in_features % self.splits or out_features % self.splits:
            raise ValueError(
                f"splits (={self.splits}) must divide the sizes of every adapted linear, and one is {in_features} x "
                f"{out_features}; lower it, or leave that linear out of target_modules"
            )

    def build(self, bank: BankConfig, tasks: int) -> Core:
        return _FactorMix(self.splits)


@config
class InnerMix(_AnyCore):
    """What experts are made of is averaged, and then becomes factors: the leaves of tensor products, each order by
    weights of its own (TensorPoly-II), or the codes of a hypernetwork (Hyper-X)."""

    @property
    def serves_tokens(self) -> bool:
        return False

    def num_gates(self, bank: BankConfig) -> int:
        if bank.inner_gates is None:
            raise ValueError("InnerMix is for experts that are made of something: of leaves, or of codes")
        return bank.inner_gates

    def build(self, bank: BankConfig, tasks: int) -> Core:
        return _InnerMix(self.num_gates(bank))


class _OutputMix(Core):
    def __init__(self, gates: int) -> None:
        super().__init__()
        self.gates = gates

    def materialise(self, bank: Bank, decision: Decision | None, tasks: Tensor | None) -> Factors:
        down, up = map(joined, bank.factors())
        if decision is None:
            return down.unsqueeze(0), up.unsqueeze(0)
        weights = decision.weights.to(down.dtype)
        down, up = (factor.unflatten(0, (self.gates, -1)) for factor in (down, up))
        if decision.active is None:
            return down.flatten(0, 1).expand(len(weights), -1, -1), (up * weights[..., None, None]).flatten(1, 2)
        # In the order of the experts, so that sums do not change when a task joins that brings an expert of its own.
        chosen = weights.topk(decision.active, dim=-1).indices.sort(-1).values
        weight = weights.gather(-1, chosen)
        return down[chosen].flatten(1, 2), (up[chosen] * weight[..., None, None]).flatten(1, 2)

    def mix(self, x: Tensor, bank: Bank, decision: Decision | None, tasks: Tensor | None) -> Factors:
        down, up = map(joined, bank.factors())
        hidden = F.linear(x, down)
        if decision is not None:
            weights = _per_token(decision, hidden)
            hidden = (weights.unsqueeze(-1) * hidden.unflatten(-1, (self.gates, -1))).flatten(-2)
        return hidden, up


class _HeadMix(Core):
    def __init__(self, task_matrix: Tensor | None) -> None:
        super().__init__()
        self.task_matrix = nn.Parameter(task_matrix) if task_matrix is not None else None

    def materialise(self, bank: Bank, decision: Decision | None, tasks: Tensor | None) -> Factors:
        down, up = bank.factors()
        if decision is None:
            mixed = up.sum(0, keepdim=True)
        else:
            mixed = torch.einsum("ne,ero->nro", decision.weights.to(up.dtype), up)
        if self.task_matrix is not None:
            mixed = self._matrices(tasks) @ mixed
        return down.expand(len(mixed), -1, -1), mixed

    def mix(self, x: Tensor, bank: Bank, decision: Decision | None, tasks: Tensor | None) -> Factors:
        down, up = bank.factors()
        hidden = F.linear(x, down[0])
        if self.task_matrix is not None:
            hidden = torch.einsum("nlr,nrs->nls", hidden, self._matrices(tasks))
        if decision is None:
            return hidden.repeat(1, 1, len(up)), joined(up)
        weights = _per_token(decision, hidden)
        return (weights.unsqueeze(-1) * hidden.unsqueeze(-2)).flatten(-2), joined(up)

    def _matrices(self, tasks: Tensor | None) -> Tensor:
        """`(rows, rank, rank)`, to be multiplied from the right to activations that are rows."""
        assert self.task_matrix is not None
        rows = rows_of(self.task_matrix, tasks)
        return torch.diag_embed(rows) if rows.dim() == 2 else rows


class _FactorMix(Core):
    def __init__(self, splits: int) -> None:
        super().__init__()
        self.splits = splits

    def materialise(self, bank: Bank, decision: Decision | None, tasks: Tensor | None) -> Factors:
        down, up = bank.factors()
        if decision is None:
            return down.sum(0, keepdim=True), up.sum(0, keepdim=True)
        weights = decision.weights.to(down.dtype).unflatten(-1, (self.splits, -1))
        down, up = (factor.unflatten(-1, (self.splits, -1)) for factor in (down, up))
        down, up = (torch.einsum("nqe,erqf->nrqf", weights, factor) for factor in (down, up))
        return down.flatten(-2), up.flatten(-2)

    def mix(self, x: Tensor, bank: Bank, decision: Decision | None, tasks: Tensor | None) -> Factors:
        down, up = bank.factors()
        experts, rank = down.shape[:2]
        if decision is None:
            weights = x.new_ones(1, 1, self.splits, experts).to(down.dtype)
        else:
            weights = _per_token(decision, x).to(down.dtype).unflatten(-1, (self.splits, -1))
        said = torch.einsum(
            "nlqf,erqf->nlqer", x.unflatten(-1, (self.splits, -1)), down.unflatten(-1, (self.splits, -1))
        )
        hidden = (weights.unsqueeze(-1) * said).sum((-2, -3))
        weighted = torch.einsum("nlqe,nlr->nlqer", weights.expand(*hidden.shape[:2], -1, -1), hidden).flatten(-3)
        # Each block of outputs hears its own weights only: B as a matrix with one block per split.
        blocks = up.new_zeros(self.splits, experts, rank, self.splits, up.shape[-1] // self.splits)
        parts = up.unflatten(-1, (self.splits, -1))
        for split in range(self.splits):
            blocks[split, :, :, split] = parts[:, :, split]
        return weighted, blocks.flatten(3).flatten(0, 2)


class _InnerMix(Core):
    def __init__(self, gates: int) -> None:
        super().__init__()
        self.gates = gates

    def materialise(self, bank: Bank, decision: Decision | None, tasks: Tensor | None) -> Factors:
        own = next(bank.parameters())
        if decision is None:
            return bank.blended(own.new_ones(1, self.gates))
        return bank.blended(decision.weights.to(own.dtype))


def _per_token(decision: Decision, hidden: Tensor) -> Tensor:
    """Weights `(rows, tokens or 1, gates)` for activations `(rows, tokens, ...)`."""
    weights = decision.weights.to(hidden.dtype)
    return weights.unsqueeze(1) if weights.dim() == 2 else weights


def _task_matrices(kind: str | None, tasks: int, rank: int) -> Tensor | None:
    if kind is None:
        return None
    return torch.ones(tasks, rank) if kind == "diagonal" else torch.eye(rank).repeat(tasks, 1, 1)
