"""A task joins a trained hub: what it brings along, how that starts, and what must stay as it is."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..routing import Granularity, OwnScore, Prototypes, Router, own_gates
from .banks import DenseBank
from .branch import Branch
from .held import Held, Part
from .low_rank import LowRank
from .peft_config import CONTAINERS

if TYPE_CHECKING:
    from .hub import LoramuxModel

Kind = Literal["expert", "row", "gate", "class"]
"""Parts of a hub: its experts; what says how a task uses experts it shares; whether a task's own expert acts; what a
router of prompts knows of a task."""
Trained = Kind | Literal["all experts"]


@dataclass(frozen=True)
class Growth:
    """One tensor of an adapter after a task has joined; `known` is how many rows it had before."""

    tensor: Tensor
    kind: Kind
    known: int

    @property
    def is_new(self) -> bool:
        """Whether there are rows that were not there before."""
        return self.tensor.dim() > 0 and len(self.tensor) > self.known


class NewTask:
    """What is new in a hub since a task joined it.

    Args:
        hub: after the task has joined.
        adapter: what it joined.
        before: the shape of every saved tensor of the adapter before.
    """

    def __init__(self, hub: "LoramuxModel", adapter: str, before: Mapping[str, tuple[int, ...]]) -> None:
        self._branches = [branch for layer in hub.layers().values() for branch in layer.branches(adapter)]
        self._routers = list(hub.routers(adapter))
        self._common = list(hub.common_banks(adapter).values())
        kinds = dict(self._kinds())
        self.parts = [
            Growth(tensor, kinds[id(tensor)], (*before[name], 0)[0])
            for name, tensor in saved_tensors(hub, adapter).items()
        ]

    @property
    def brings(self) -> set[Kind]:
        """The kinds of its new rows."""
        return {part.kind for part in self.parts if part.is_new}

    @property
    def has_prompt_prototypes(self) -> bool:
        """Whether prompts find the task's own expert by a prototype, which needs no training."""
        return any(isinstance(r.scorer, Prototypes) and r.granularity == Granularity.SEQUENCE for r in self._routers)

    @property
    def learns_labels(self) -> bool:
        """Whether a router of prompts must learn to tell the task from the others."""
        return any(router.config.learns_labels for router in self._routers)

    @property
    def joins_every_task(self) -> bool:
        """Whether its expert may be chosen for tokens of other tasks too."""
        return any(
            router is not None and router.scorer.granularity == Granularity.TOKEN and not router.scorer.needs_task
            for router in (branch.config.router for branch in self._with_new_expert())
        )

    @property
    def is_summed_with_others(self) -> bool:
        """Whether other tasks sum over its expert too, at weight zero: they are then equal to rounding only."""
        return any(branch.sums_over_all for branch in self._with_new_expert())

    def all_but(self, trained: Iterable[Trained]) -> Held:
        """Everything else in the adapter, to be held still."""
        return Held(part for growth in self.parts if (part := _held(growth, set(trained))) is not None)

    def count(self, trained: Iterable[Trained]) -> int:
        """How many numbers train."""
        return sum(_free(growth, set(trained)) for growth in self.parts if isinstance(growth.tensor, nn.Parameter))

    @torch.no_grad()
    def start_at_mean(self) -> None:
        """Use experts as the other tasks do on average (the unknown task of Caccia et al. 2023)."""
        for part in self.parts:
            if part.kind == "row" and part.is_new:
                part.tensor[part.known :] = part.tensor[: part.known].mean(0)

    @torch.no_grad()
    def start_as_blend(self, blend: Tensor) -> None:
        """Make its expert the blend of those of the other tasks, or the nearest to it of an expert's rank.

        Args:
            blend: `(tasks,)`, shares of the other tasks.
        """
        shares = torch.cat([blend, blend.new_zeros(1)]).unsqueeze(0)
        for branch in self._with_new_expert():
            bank = branch.bank
            assert isinstance(bank, DenseBank)
            down, up = branch.core.materialise(bank, own_gates(shares.to(bank.down), branch.config.gates), None)
            pair = LowRank(down[0], up[0].T).compressed(branch.config.bank.rank)
            bank.down[-1], bank.up[-1] = pair.down, pair.up.T

    def _with_new_expert(self) -> Iterator[Branch]:
        new = {id(part.tensor) for part in self.parts if part.is_new and part.kind == "expert"}
        return (branch for branch in self._branches if any(id(p) in new for p in branch.bank.parameters()))

    def _kinds(self) -> Iterator[tuple[int, Kind]]:
        for branch in self._branches:
            yield from ((id(tensor), "expert") for tensor in branch.bank.state_dict(keep_vars=True).values())
            yield from ((id(tensor), "row") for tensor in branch.core.state_dict(keep_vars=True).values())
        for common in self._common:
            named = common.state_dict(keep_vars=True).items()
            yield from ((id(tensor), "row" if name in common.codes else "expert") for name, tensor in named)
        for router in self._routers:
            yield from ((id(tensor), _kind(router)) for tensor in router.state_dict(keep_vars=True).values())


def saved_tensors(hub: "LoramuxModel", adapter: str) -> dict[str, Tensor]:
    """The parameters and buffers of an adapter that are saved with it, by name, themselves and not copies."""
    containers = [f"{container}.{adapter}." for container in CONTAINERS]
    named = hub.state_dict(keep_vars=True).items()
    return {name: tensor for name, tensor in named if any(container in name for container in containers)}


@torch.no_grad()
def even_blend(hub: "LoramuxModel") -> dict[str, LowRank]:
    """The even blend of all experts of every layer as one plain LoRA (MHR-mu, Caccia et al. 2023).

    Where factors are averaged it has the rank of one expert, where deltas are summed that of all together; never more
    than the layer can use.
    """
    adapter = hub.active_adapters[0]
    blended = {}
    for name, layer in hub.layers().items():
        with torch.device(hub.model.device):
            pairs = [branch.even_factors() for branch in layer.branches(adapter)]
        pair = LowRank(torch.cat([down[0] for down, _ in pairs]), torch.cat([up[0] for _, up in pairs]).T)
        blended[name] = pair.without_excess()
    return blended


def _kind(router: Router) -> Kind:
    scorer = router.config.scorer
    if not scorer.needs_task:
        return "class"
    return "gate" if isinstance(scorer, OwnScore) else "row"


def _held(growth: Growth, trained: set[Trained]) -> Part | None:
    if growth.kind == "expert" and "all experts" in trained:
        return None
    return growth.tensor, slice(growth.known) if growth.is_new and growth.kind in trained else ...


def _free(growth: Growth, trained: set[Trained]) -> int:
    if growth.kind == "expert" and "all experts" in trained:
        return growth.tensor.numel()
    return growth.tensor[growth.known :].numel() if growth.is_new and growth.kind in trained else 0
