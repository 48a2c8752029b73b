"""A plain low-rank update, the form in which adapters leave the hub."""

from dataclasses import dataclass

import torch
from torch import Tensor

RANK_CLASSES = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks vLLM and PEFT's hot-swapping take."""


@dataclass(frozen=True)
class LowRank:
    """`delta = up @ down`, with every scale in `up`.

    Attributes:
        down: `A (rank, in_features)`.
        up: `B (out_features, rank)`.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """`(out_features, in_features)`."""
        return self.up @ self.down

    def compressed(self, rank: int) -> "LowRank":
        """The best approximation of at most this rank; exact when the delta has no more than that."""
        q_up, r_up = torch.linalg.qr(self.up.double())
        q_down, r_down = torch.linalg.qr(self.down.double().T)
        u, s, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        root = s.sqrt()
        dtype = self.down.dtype
        return LowRank((root[:, None] * (v @ q_down.T)).to(dtype), ((q_up @ u) * root).to(dtype))

    def without_zeros(self) -> "LowRank":
        """The same delta without the ranks that add nothing to it, such as those of experts with weight zero."""
        used = (self.down != 0).any(1) & (self.up != 0).any(0)
        return LowRank(self.down[used], self.up[:, used])

    def without_excess(self) -> "LowRank":
        """The same, compressed where its rank is above what matrices of these sizes, or any rank class, can hold."""
        limit = min(self.down.shape[1], self.up.shape[0], RANK_CLASSES[-1])
        return self.compressed(limit) if self.rank > limit else self

    def padded(self, rank: int) -> "LowRank":
        """The same delta at a larger rank, filled up with zeros."""
        extra = rank - self.rank
        return LowRank(
            torch.cat([self.down, self.down.new_zeros(extra, self.down.shape[1])]),
            torch.cat([self.up, self.up.new_zeros(self.up.shape[0], extra)], dim=1),
        )


def rank_class(rank: int) -> int:
    """The smallest rank class that holds `rank`, or the largest class."""
    return next((size for size in RANK_CLASSES if size >= rank), RANK_CLASSES[-1])


def to_one_rank_class(factors: dict[str, LowRank]) -> dict[str, LowRank]:
    """Bring all layers to one rank class, compressing only what no class or no matrix of that size can hold."""
    reduced = {name: pair.without_excess() for name, pair in factors.items()}
    rank = rank_class(max(pair.rank for pair in reduced.values()))
    return {name: pair.padded(rank) for name, pair in reduced.items()}
