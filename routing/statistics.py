"""Who is used by whom: routing counts per layer and task, collected while a model runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class LayerUsage:
    """Routing of one layer, summed over the tokens seen.

    Attributes:
        weights: `(tasks, gates)`, summed weights.
        tokens: `(tasks,)`, tokens counted (or prompts, for sequence routers).
        entropy: `(tasks,)`, summed entropy of the normalised weights, in nats.
    """

    weights: Tensor
    tokens: Tensor
    entropy: Tensor

    def usage(self) -> Tensor:
        """`(tasks, gates)`: mean share of each gate; rows of tasks that were seen sum to one."""
        return self.weights / self.weights.sum(-1, keepdim=True).clamp(min=1e-12)

    def effective_experts(self) -> float:
        """How many gates carry the traffic: `(sum u)^2 / sum u^2` of the overall usage `u`."""
        usage = self.weights.sum(0)
        return float(usage.sum() ** 2 / usage.square().sum().clamp(min=1e-12))

    def mean_entropy(self) -> float:
        return float(self.entropy.sum() / self.tokens.sum().clamp(min=1))


@dataclass
class RoutingStatistics:
    """Collects `LayerUsage` per layer; rows follow `tasks`, or one row `all` when tasks are not known."""

    tasks: Sequence[str]
    layers: dict[str, LayerUsage] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, layer: str, weights: Tensor, mask: Tensor | None, tasks: Tensor | None) -> None:
        """Count one call.

        Args:
            layer: the name of the adapted module, or of the shared router.
            weights: `(batch, ..., gates)`.
            mask: `(batch, ...)`, true for real tokens.
            tasks: `(batch,)` task ids, `(batch, tasks)` blends (counted where they are largest), or None.
        """
        batch, gates = weights.shape[0], weights.shape[-1]
        rows = len(self.tasks)
        weights = weights.detach().float().reshape(batch, -1, gates)
        counted = torch.ones(weights.shape[:2]) if mask is None else mask.reshape(batch, -1).float()
        counted = counted.to(weights.device)
        share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
        entropy = -(share * share.clamp(min=1e-12).log()).sum(-1) * counted
        index = torch.zeros(1, dtype=torch.long) if tasks is None else tasks
        index = index if index.dim() == 1 else index.argmax(-1)
        index = index.repeat_interleave(batch // len(index)).to(weights.device)  # beams lie next to each other
        usage = self.layers.setdefault(
            layer, LayerUsage(torch.zeros(rows, gates), torch.zeros(rows), torch.zeros(rows))
        )
        usage.weights.index_add_(0, index.cpu(), (weights * counted.unsqueeze(-1)).sum(1).cpu())
        usage.tokens.index_add_(0, index.cpu(), counted.sum(1).cpu())
        usage.entropy.index_add_(0, index.cpu(), entropy.sum(1).cpu())

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
