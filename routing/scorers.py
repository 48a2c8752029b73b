"""What the weights of a router depend on. Each scorer is a config that builds its module.

A new scorer needs a config with `granularity` and `build(dims)`, and a module whose `forward(x, tasks)` returns scores.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support.config import config
from ..support.errors import AdapterError
from .decision import Granularity


@dataclass(frozen=True)
class RouterDims:
    """The sizes a router is built for: `in_features` of its input, number of tasks and number of gates."""

    in_features: int
    tasks: int
    gates: int


class Scorer(Protocol):
    granularity: ClassVar[Granularity]
    is_task_logits: ClassVar[bool]
    """Whether the parameters are per-task logits, which want a learning rate of their own."""

    def build(self, dims: RouterDims) -> nn.Module: ...


@config
class TaskTable:
    """One trainable row of scores per task."""

    init_std: float = 0.0
    granularity: ClassVar[Granularity] = Granularity.TASK
    is_task_logits: ClassVar[bool] = True

    def build(self, dims: RouterDims) -> nn.Module:
        return _Table(torch.randn(dims.tasks, dims.gates) * self.init_std)


@config
class TokenLinear:
    """A linear map of each token's input to the adapted layer."""

    init_std: float | None = 0.02
    granularity: ClassVar[Granularity] = Granularity.TOKEN
    is_task_logits: ClassVar[bool] = False

    def build(self, dims: RouterDims) -> nn.Module:
        return _linear(dims.in_features, dims.gates, self.init_std)


@config
class PooledPrompt:
    """A classifier on the mean of the frozen base's last hidden states over the prompt.

    `hidden` puts one GELU layer of that width before the output.
    """

    hidden: int | None = None
    granularity: ClassVar[Granularity] = Granularity.SEQUENCE
    is_task_logits: ClassVar[bool] = False

    def build(self, dims: RouterDims) -> nn.Module:
        if self.hidden is None:
            return _Linear(dims.in_features, dims.gates)
        return _Perceptron(dims.in_features, self.hidden, dims.gates)


class _Table(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        if tasks is None:
            raise AdapterError(
                "this adapter is routed by task: pass routing_tasks=, or call it inside hub.routing(tasks=)"
            )
        return self.logits[tasks]


class _Linear(nn.Linear):
    def __init__(self, in_features: int, gates: int) -> None:
        super().__init__(in_features, gates, bias=False)

    def forward(self, x: Tensor, tasks: Tensor | None = None) -> Tensor:
        # Routing decisions are made in the precision of the router (float32 over a half-precision base).
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight)


class _Perceptron(nn.Module):
    def __init__(self, in_features: int, hidden: int, gates: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(in_features, hidden), nn.Linear(hidden, gates)

    def forward(self, x: Tensor, tasks: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.up(F.gelu(self.down(x.to(self.down.weight.dtype))))


def _linear(in_features: int, gates: int, init_std: float | None) -> nn.Module:
    module = _Linear(in_features, gates)
    if init_std is not None:
        nn.init.normal_(module.weight, std=init_std)
    return module
