"""Who is used by whom: routing counts per layer and task, collected while a model runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_MOST_HELD = 2**18  # weights that wait to be counted: 1 MB in float32, which stays in a processor's cache


class RouteObserver(Protocol):
    """What sees every decision that routers make."""

    def add(self, layer: str, weights: Tensor, mask: Tensor | None, tasks: Tensor | None, groups: int = 1) -> None:
        """Take what one router decided in one call.

        Args:
            layer: the name of the adapted module, or of the shared router.
            weights: `(batch, ..., gates)`.
            mask: `(batch, ...)`, true for real tokens.
            tasks: `(batch,)` task ids, `(batch, tasks)` blends (counted where they are largest), or None.
            groups: number of independent decisions side by side, each over its share of the gates.
        """
        ...


def router_name(place: str, branch: int) -> str:
    """What statistics call a router: the adapted module, or `prompt` or `model`, and which branch after the first."""
    return place if branch == 0 else f"{place} (branch {branch + 1})"


@dataclass
class LayerUsage:
    """Routing of one layer, summed over the tokens seen.

    Attributes:
        weights: `(tasks, gates)`, summed sizes of the weights.
        tokens: `(tasks,)`, tokens counted (or prompts, for sequence routers).
        entropy: `(tasks,)`, summed entropy of the normalised weights, in nats, the mean over groups.
        groups: number of independent decisions side by side, each over its share of the gates.
    """

    weights: Tensor
    tokens: Tensor
    entropy: Tensor
    groups: int = 1

    @classmethod
    def empty(cls, tasks: int, gates: int, groups: int = 1) -> "LayerUsage":
        return cls(torch.zeros(tasks, gates), torch.zeros(tasks), torch.zeros(tasks), groups)

    def usage(self) -> Tensor:
        """`(tasks, gates)`: mean share of each gate; rows of tasks that were seen sum to one."""
        return self.weights / self.weights.sum(-1, keepdim=True).clamp(min=1e-12)

    def effective_experts(self) -> float:
        """How many gates carry the traffic: `(sum u)^2 / sum u^2` of the overall usage `u`, the mean over groups."""
        usage = self.weights.sum(0).unflatten(-1, (self.groups, -1))
        return float((usage.sum(-1) ** 2 / usage.square().sum(-1).clamp(min=1e-12)).mean())

    def mean_entropy(self) -> float:
        return float(self.entropy.sum() / self.tokens.sum().clamp(min=1))


@dataclass
class RoutingStatistics:
    """Collects `LayerUsage` per layer; rows follow `tasks`, or one row `all` when tasks are not known.

    Decisions are held until `count`, which takes many layers at a time: counting each by itself would slow training.
    """

    tasks: Sequence[str]
    _layers: dict[str, LayerUsage] = field(default_factory=dict)
    _sums: dict[tuple[str, ...], "_Sums"] = field(default_factory=dict)
    _held: list["_Held"] = field(default_factory=list)
    _held_size: int = 0

    def add(self, layer: str, weights: Tensor, mask: Tensor | None, tasks: Tensor | None, groups: int = 1) -> None:
        """Count what one router decided in one call; see `RouteObserver.add`."""
        self._held.append(_Held(layer, weights.detach(), mask, tasks, groups))
        self._held_size += weights.numel()
        if self._held_size > _MOST_HELD:
            self.count()

    @torch.no_grad()
    def count(self) -> None:
        """Count what is held."""
        alike: dict[tuple[Any, ...], list[_Held]] = {}
        for held in self._held:
            alike.setdefault(held.kind, []).append(held)
            if held.layer not in self._layers:  # in the order of the model
                self._layers[held.layer] = LayerUsage.empty(len(self.tasks), held.weights.shape[-1], held.groups)
        for members in alike.values():
            names = tuple(held.layer for held in members)
            sums = _sum_up(members, len(self.tasks))
            before = self._sums.get(names)
            self._sums[names] = sums if before is None else _Sums(*map(torch.add, before, sums))
        self._held, self._held_size = [], 0

    @property
    def layers(self) -> dict[str, LayerUsage]:
        """All that was seen so far, by layer, on the CPU."""
        self.count()
        for names, sums in self._sums.items():
            weights, tokens, entropy = (part.cpu() for part in sums)
            for name, own_weights, own_entropy in zip(names, weights, entropy, strict=True):
                layer = self._layers[name]
                layer.weights += own_weights
                layer.tokens += tokens
                layer.entropy += own_entropy
        self._sums = {}
        return self._layers

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON: per layer the task x gate usage, the entropy and the effective experts."""
        return {
            "tasks": list(self.tasks),
            "layers": {
                name: {
                    "usage": [[round(v, 6) for v in row] for row in layer.usage().tolist()],
                    "tokens": layer.tokens.tolist(),
                    "entropy": round(layer.mean_entropy(), 6),
                    "effective_experts": round(layer.effective_experts(), 6),
                }
                for name, layer in self.layers.items()
            },
        }


class _Held(NamedTuple):
    """A decision that waits to be counted."""

    layer: str
    weights: Tensor
    mask: Tensor | None
    tasks: Tensor | None
    groups: int

    @property
    def kind(self) -> tuple[Any, ...]:
        """The same for decisions that can be counted as one."""
        weights = self.weights
        return weights.shape, weights.dtype, weights.device, id(self.mask), id(self.tasks), self.groups


class _Sums(NamedTuple):
    """Of several layers: weights `(layers, tasks, gates)`, tokens `(tasks,)` and entropy `(layers, tasks)`."""

    weights: Tensor
    tokens: Tensor
    entropy: Tensor


def _sum_up(members: Sequence[_Held], tasks: int) -> _Sums:
    """Count decisions of one kind."""
    weights = torch.stack([held.weights for held in members]).float().abs()
    batch, groups = weights.shape[1], members[0].groups
    weights = weights.reshape(len(members), -1, groups, weights.shape[-1] // groups)
    share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    entropy = -share.clamp(min=1e-12).log_().mul_(share).sum(-1).mean(-1)  # torch.special.entr is twice as slow
    of_task = _rows_of_tasks(members[0], batch, weights.shape[1], tasks, weights.device)
    with torch.autocast(weights.device.type, enabled=False):
        return _Sums(of_task @ weights.flatten(2), of_task.sum(1), entropy @ of_task.T)


def _rows_of_tasks(held: _Held, batch: int, rows: int, tasks: int, device: torch.device) -> Tensor:
    """`(tasks, rows)`: how many real tokens of a task each row stands for; one or none where tokens are routed."""
    index = torch.zeros(1, dtype=torch.long) if held.tasks is None else held.tasks
    index = index if index.dim() == 1 else index.argmax(-1)
    index = index.to(device).repeat_interleave(rows // len(index))  # beams and tokens of a row lie next to each other
    of_task = torch.nn.functional.one_hot(index, tasks).T.float()
    return of_task if held.mask is None else of_task * held.mask.to(device).reshape(rows, -1).sum(-1)
