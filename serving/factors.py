"""How adapters lie in memory: all factors of one adapter in one vector, so that a row of a batch takes one copy.

A LoRA is kept as one flat vector. Linears that read the same input stand together, their A matrices one under the
other, so that one product serves them all; their B matrices follow.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import LowRank


@dataclass(frozen=True)
class Group:
    """Linears that read one input.

    Attributes:
        names: of the modules.
        in_features: of them all.
        out_features: of each.
    """

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]

    @property
    def width(self) -> int:
        """Numbers per rank."""
        return len(self.names) * self.in_features + sum(self.out_features)


@dataclass(frozen=True)
class PackedLora:
    """One adapter.

    Attributes:
        rank: of every linear; lower ones are filled up with zeros.
        flat: `(rank * layout.width,)`, laid out as `FactorLayout` says.
        groups: numbers of the groups of linears that it changes.
    """

    rank: int
    flat: Tensor
    groups: frozenset[int]

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()


@dataclass(frozen=True)
class FactorLayout:
    """Where the factors of every adaptable linear lie in an adapter's vector."""

    groups: tuple[Group, ...]

    @property
    def width(self) -> int:
        """Numbers per rank, over all linears."""
        return sum(group.width for group in self.groups)

    def pack(self, factors: Mapping[str, LowRank], dtype: torch.dtype) -> PackedLora:
        """Lay an adapter out; scales are folded into B before its precision is lowered to `dtype`.

        Args:
            factors: by module name; linears that are not named stay as they are in the base.
        """
        rank = max(pair.rank for pair in factors.values())
        flat = torch.zeros(rank * self.width, dtype=dtype)
        for group, downs, ups in self.views(flat, rank):
            for index, name in enumerate(group.names):
                if name in factors:
                    pair = factors[name]
                    downs[index, : pair.rank] = pair.down
                    ups[index][: pair.rank] = pair.up.T
        touched = (number for number, group in enumerate(self.groups) if any(name in factors for name in group.names))
        return PackedLora(rank, flat, frozenset(touched))

    def views(self, flat: Tensor, rank: int) -> Iterator[tuple[Group, Tensor, list[Tensor]]]:
        """Every group with its part of vectors `(..., rank * width)`: the A matrices `(..., linears, rank,
        in_features)`, and the B matrices `(..., rank, out_features)` of each linear."""
        at = 0
        leading = flat.shape[:-1]
        for group in self.groups:
            size = len(group.names) * rank * group.in_features
            downs = flat[..., at : at + size].view(*leading, len(group.names), rank, group.in_features)
            at += size
            ups = []
            for out_features in group.out_features:
                ups.append(flat[..., at : at + rank * out_features].view(*leading, rank, out_features))
                at += rank * out_features
            yield group, downs, ups


def combine(layout: FactorLayout, parts: Sequence[tuple[PackedLora, float]], rank: int, into: Tensor) -> None:
    """Write the weighted sum of adapters into a vector `(rank * width,)`; `rank` is at least the sum of their ranks."""
    if len(parts) == 1 and parts[0][0].rank == rank:
        into.copy_(parts[0][0].flat)
        if parts[0][1] != 1:
            for _, _, ups in layout.views(into, rank):
                for up in ups:
                    up.mul_(parts[0][1])
        return
    into.zero_()
    targets = list(layout.views(into, rank))
    start = 0
    for lora, share in parts:
        end = start + lora.rank
        for (_, downs, ups), (_, own_downs, own_ups) in zip(targets, layout.views(lora.flat, lora.rank), strict=True):
            downs[:, start:end] = own_downs
            for up, own_up in zip(ups, own_ups, strict=True):
                up[start:end] = own_up if share == 1 else own_up * share
        start = end
