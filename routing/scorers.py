"""What the weights of a router depend on. Each scorer is a config that builds its module.

A new scorer needs a config with `granularity` and `build(dims)`, and a module whose `forward(x, tasks)` returns scores
for the task ids `(batch,)`. A blend of tasks is the router's affair: it mixes what the tasks decide alone.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..support.config import config
from ..support.errors import AdapterError
from .decision import Granularity


@dataclass(frozen=True)
class RouterDims:
    """The sizes a router is built for: `in_features` of its input, number of tasks and number of scores, and how many
    layers it decides for."""

    in_features: int
    tasks: int
    scores: int
    layers: int = 1


class Scorer(Protocol):
    granularity: ClassVar[Granularity]
    is_task_logits: ClassVar[bool]
    """Whether the parameters are per-task logits, which want a learning rate of their own."""
    needs_task: ClassVar[bool]
    """Whether a call that names no task is an error."""

    def build(self, dims: RouterDims) -> nn.Module: ...


class Prototypes(nn.Module):
    """How much an input points along each of `directions (scores, in_features)`, which are set and not trained."""

    directions: Tensor

    def __init__(self, in_features: int, scores: int, *, absolute: bool) -> None:
        super().__init__()
        self.absolute = absolute
        self.register_buffer("directions", torch.zeros(scores, in_features))

    def forward(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.directions.dtype)
            if self.absolute:
                return F.linear(x, self.directions).abs()
            return F.linear(F.normalize(x, dim=-1), self.directions)


@config
class Constant:
    """Zeros: for normalisers that decide without scores."""

    granularity: ClassVar[Granularity] = Granularity.FIXED
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = False

    def build(self, dims: RouterDims) -> nn.Module:
        return _Given(torch.zeros(1, dims.scores), by_task=False)


@config
class TaskTable:
    """One trainable row of scores per task.

    Rows start at `init`, with noise of deviation `init_std`, and `diagonal` more where task and gate are the same.
    """

    init: float = 0.0
    init_std: float = 0.0
    diagonal: float = 0.0
    granularity: ClassVar[Granularity] = Granularity.TASK
    is_task_logits: ClassVar[bool] = True
    needs_task: ClassVar[bool] = True

    def build(self, dims: RouterDims) -> nn.Module:
        scores = self.init + torch.randn(dims.tasks, dims.scores) * self.init_std
        return _Table(scores + self.diagonal * torch.eye(dims.tasks, dims.scores))


@config
class FixedTable:
    """A row of scores per task that is given and never trained."""

    rows: tuple[tuple[float, ...], ...]
    granularity: ClassVar[Granularity] = Granularity.TASK
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = True

    @property
    def most_open(self) -> int:
        """The most scores that are not zero in a row."""
        return max(sum(score != 0 for score in row) for row in self.rows)

    def build(self, dims: RouterDims) -> nn.Module:
        if len(self.rows) != dims.tasks or any(len(row) != dims.scores for row in self.rows):
            raise ValueError(f"the table has {len(self.rows)} rows; it wants {dims.tasks} of {dims.scores} numbers")
        return _Given(torch.tensor(self.rows), by_task=True)


@config
class OwnScore:
    """One trainable score per task for the task's own gate; the gates of other tasks score zero (TAPS)."""

    init: float = 0.0
    granularity: ClassVar[Granularity] = Granularity.TASK
    is_task_logits: ClassVar[bool] = True
    needs_task: ClassVar[bool] = True

    def build(self, dims: RouterDims) -> nn.Module:
        return _OwnScore(torch.full((dims.tasks,), self.init))


@config
class TaskEmbedding:
    """Scores computed from a trainable vector per task of width `dim`: linearly, or through a layer of `hidden`."""

    dim: int = 64
    hidden: int | None = None
    granularity: ClassVar[Granularity] = Granularity.TASK
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = True

    def build(self, dims: RouterDims) -> nn.Module:
        return _TaskEmbedding(dims.tasks, _head(self.dim, self.hidden, dims.scores), self.dim)


@config
class TokenLinear:
    """A linear map of each token's input to the adapted layer."""

    init_std: float | None = 0.02
    granularity: ClassVar[Granularity] = Granularity.TOKEN
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = False

    def build(self, dims: RouterDims) -> nn.Module:
        return _linear(dims.in_features, dims.scores, self.init_std)


@config
class TokenPerceptron:
    """A GELU layer of width `hidden` between each token's input and its scores."""

    hidden: int = 64
    granularity: ClassVar[Granularity] = Granularity.TOKEN
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = False

    def build(self, dims: RouterDims) -> nn.Module:
        return _Perceptron(dims.in_features, self.hidden, dims.scores)


@config
class TokenAndTask:
    """Scores of each token's input for its task.

    `joined` is a linear map of the token and a task vector of width `dim`; `separate` is a linear map of its own per
    task (Gupta et al. 2022).
    """

    form: Literal["joined", "separate"] = "joined"
    dim: int = 32
    init_std: float = 0.02
    granularity: ClassVar[Granularity] = Granularity.TOKEN
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = True

    def build(self, dims: RouterDims) -> nn.Module:
        if self.form == "separate":
            return _LinearPerTask(dims, self.init_std)
        return _TokenAndTask(dims, self.dim, self.init_std)


@config
class OwnTokenGate:
    """One score per token, from a GELU layer of width `hidden`, for the gate of its own task; the others stay shut."""

    hidden: int = 64
    granularity: ClassVar[Granularity] = Granularity.TOKEN
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = True

    def build(self, dims: RouterDims) -> nn.Module:
        return _OwnTokenGate(dims, self.hidden)


@config
class TokenPrototypes:
    """How much each token's input points along the prototype of an expert, in either direction (Arrow).

    Prototypes are not trained; `Branch.fit_prototypes` reads them off the experts.
    """

    granularity: ClassVar[Granularity] = Granularity.TOKEN
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = False

    def build(self, dims: RouterDims) -> nn.Module:
        return Prototypes(dims.in_features, dims.scores, absolute=True)


@config
class FirstPass:
    """Scores for every layer at once, from the last hidden states of a pass of the frozen base (X-LoRA).

    They come out as `(layers, ..., scores)`. `hidden` puts one ReLU layer of that width before the output, with
    `dropout` in training.
    """

    hidden: int | None = None
    dropout: float = 0.0
    granularity: ClassVar[Granularity] = Granularity.TOKEN
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"the router's dropout (={self.dropout}) must be in [0, 1)")

    def build(self, dims: RouterDims) -> nn.Module:
        return _FirstPass(dims, self.hidden, self.dropout)


@config
class PooledPrompt:
    """A classifier on the mean of the frozen base's last hidden states over the prompt.

    `hidden` puts one GELU layer of that width before the output.
    """

    hidden: int | None = None
    granularity: ClassVar[Granularity] = Granularity.SEQUENCE
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = False

    def build(self, dims: RouterDims) -> nn.Module:
        return _head(dims.in_features, self.hidden, dims.scores)


@config
class PromptPrototypes:
    """How near (by cosine) the pooled prompt is to the mean prompt of each task; not trained (RouterRetriever)."""

    granularity: ClassVar[Granularity] = Granularity.SEQUENCE
    is_task_logits: ClassVar[bool] = False
    needs_task: ClassVar[bool] = False

    def build(self, dims: RouterDims) -> nn.Module:
        return Prototypes(dims.in_features, dims.scores, absolute=False)


def identity_rows(count: int) -> tuple[tuple[float, ...], ...]:
    """The rows of a `FixedTable` that gives every task its own gate."""
    return tuple(tuple(float(row == column) for column in range(count)) for row in range(count))


def rows_of(table: Tensor, tasks: Tensor | None) -> Tensor:
    """The rows `(batch, ...)` of a table `(tasks, ...)` that task ids or blends of tasks name.

    Raises:
        AdapterError: when no tasks are named.
    """
    if tasks is None:
        raise AdapterError("this adapter is routed by task: pass routing_tasks=, or call it inside hub.routing(tasks=)")
    if tasks.dim() == 1:
        return table[tasks]
    return torch.tensordot(tasks.to(table.dtype), table, dims=1)


class _Given(nn.Module):
    rows: Tensor

    def __init__(self, rows: Tensor, *, by_task: bool) -> None:
        super().__init__()
        self.by_task = by_task
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        return rows_of(self.rows, tasks) if self.by_task else self.rows


class _Table(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        return rows_of(self.logits, tasks)


class _OwnScore(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        return rows_of(torch.diag(self.logits), tasks)


class _TaskEmbedding(nn.Module):
    def __init__(self, tasks: int, head: nn.Module, dim: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(tasks, dim))
        self.head = head

    def forward(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        return self.head(rows_of(self.vectors, tasks))


class _Linear(nn.Linear):
    def __init__(self, in_features: int, scores: int) -> None:
        super().__init__(in_features, scores, bias=False)

    def forward(self, x: Tensor, tasks: Tensor | None = None) -> Tensor:
        # Routing decisions are made in the precision of the router (float32 over a half-precision base).
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight)


class _Perceptron(nn.Module):
    def __init__(self, in_features: int, hidden: int, scores: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(in_features, hidden), nn.Linear(hidden, scores)

    def forward(self, x: Tensor, tasks: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.up(F.gelu(self.down(x.to(self.down.weight.dtype))))


class _FirstPass(nn.Module):
    """Shapes: `weight (scores, layers, width)` and `bias (scores, layers)`: a new expert is a new row."""

    def __init__(self, dims: RouterDims, hidden: int | None, dropout: float) -> None:
        super().__init__()
        inner = [nn.Linear(dims.in_features, hidden), nn.ReLU(), nn.Dropout(dropout)] if hidden is not None else []
        self.inner = nn.Sequential(*inner)
        width = dims.in_features if hidden is None else hidden
        self.weight = nn.Parameter(torch.empty(dims.scores, dims.layers, width))
        self.bias = nn.Parameter(torch.zeros(dims.scores, dims.layers))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, tasks: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.einsum("...d,eld->l...e", self.inner(x.to(self.weight.dtype)), self.weight)
            bias = self.bias.T.reshape(scores.shape[0], *[1] * (x.dim() - 1), scores.shape[-1])
            return scores + bias


class _TokenAndTask(nn.Module):
    def __init__(self, dims: RouterDims, dim: int, init_std: float) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(dims.tasks, dim))
        self.of_task = _linear(dim, dims.scores, init_std)
        self.of_token = _linear(dims.in_features, dims.scores, init_std)

    def forward(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        of_task = self.of_task(rows_of(self.vectors, tasks))
        of_token = self.of_token(x)
        return (of_token.reshape(len(of_task), -1, of_task.shape[-1]) + of_task.unsqueeze(1)).reshape(of_token.shape)


class _LinearPerTask(nn.Module):
    def __init__(self, dims: RouterDims, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dims.tasks, dims.scores, dims.in_features) * init_std)

    def forward(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = rows_of(self.weight, tasks)
            rows = x.to(weight.dtype).reshape(len(weight), -1, x.shape[-1])
            return torch.bmm(rows, weight.transpose(1, 2)).reshape(*x.shape[:-1], -1)


class _OwnTokenGate(nn.Module):
    own: Tensor

    def __init__(self, dims: RouterDims, hidden: int) -> None:
        super().__init__()
        self.perceptron = _Perceptron(dims.in_features, hidden, 1)
        nn.init.constant_(self.perceptron.up.bias, 1.0)  # experts are in use at the start
        self.register_buffer("own", torch.eye(dims.tasks, dims.scores), persistent=False)

    def forward(self, x: Tensor, tasks: Tensor | None) -> Tensor:
        own = rows_of(self.own, tasks)
        score = self.perceptron(x)
        rows = score.reshape(len(own), -1, 1)
        scores = torch.where(own.unsqueeze(1) > 0, rows, torch.finfo(rows.dtype).min / 2)
        return scores.reshape(*score.shape[:-1], -1)


def _head(in_features: int, hidden: int | None, scores: int) -> nn.Module:
    return _Linear(in_features, scores) if hidden is None else _Perceptron(in_features, hidden, scores)


def _linear(in_features: int, scores: int, init_std: float | None) -> nn.Module:
    module = _Linear(in_features, scores)
    if init_std is not None:
        nn.init.normal_(module.weight, std=init_std)
    return module
