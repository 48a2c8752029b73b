"""Banks whose factors come out of a network that all layers share.

The network holds a code per task, and what it makes of a code at a layer is that task's expert there. Where a row is a
blend of tasks the codes are blended, and the expert is made of the blend.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..support.config import config
from .banks import Bank, Common, Shape, require_positive


@config
class Hyper:
    """Factors made by one hypernetwork from the codes of a task, a language and a layer (Hyper-X).

    `magnitude_invariant` keeps the size of what goes in constant, by its cosine and sine, and adds what comes out to
    trained factors of each layer (Ortiz et al. 2023).

    Attributes:
        tasks, languages: the number of the task, and of the language, of every expert.
        code: width of each of the three codes.
        source: width of what the three codes become before the last layer.
    """

    tasks: tuple[int, ...]
    languages: tuple[int, ...]
    rank: int = 8
    code: int = 64
    source: int = 192
    magnitude_invariant: bool = False
    shared_down: bool = False

    def __post_init__(self) -> None:
        require_positive(rank=self.rank, code=self.code, source=self.source, tasks=len(self.tasks))
        if len(self.languages) != len(self.tasks):
            raise ValueError(f"{len(self.tasks)} experts need as many languages, got {len(self.languages)}")

    @property
    def experts(self) -> int:
        return len(self.tasks)

    @property
    def inner_gates(self) -> int:
        return self.experts

    def common(self, shapes: Iterable[Shape]) -> "HyperNetwork":
        return HyperNetwork(self, shapes)

    def build(self, in_features: int, out_features: int) -> "HyperBank":
        return HyperBank(self, in_features, out_features)


@config
class Template:
    """Factors that are one small template per task, stretched by Kronecker products to every layer (Polyhistor).

    Attributes:
        experts: number of tasks.
        rank: of the stretched factors, a multiple of `template_rank`.
        template_rank, template_width: sizes of the template of A, and of that of B.
        code: width of a task's code.
        hidden: rank of the hypernetwork that makes templates of codes.
    """

    experts: int
    rank: int = 8
    template_rank: int = 2
    template_width: int = 64
    code: int = 64
    hidden: int = 16
    shared_down: bool = False

    def __post_init__(self) -> None:
        require_positive(experts=self.experts, rank=self.rank, code=self.code, hidden=self.hidden)
        require_positive(template_rank=self.template_rank, template_width=self.template_width)
        if self.rank % self.template_rank:
            raise ValueError(f"template_rank (={self.template_rank}) must divide rank (={self.rank})")

    @property
    def inner_gates(self) -> int:
        return self.experts

    def common(self, shapes: Iterable[Shape]) -> "TemplateNetwork":
        return TemplateNetwork(self)

    def build(self, in_features: int, out_features: int) -> "TemplateBank":
        return TemplateBank(self, in_features, out_features)


class GeneratedBank(Bank):
    """A bank with a network in common with the banks of all other layers."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self._common: tuple[Common, ...] = ()  # not registered: its parameters belong to the hub

    @property
    def common(self) -> Common:
        assert self._common, "the hub gives every generated bank its network"
        return self._common[0]

    def share(self, common: Common) -> None:
        self._common = (common,)

    def factors(self) -> tuple[Tensor, Tensor]:
        own = next(self.parameters())
        return self.blended(torch.eye(self.experts, dtype=own.dtype, device=own.device))


class HyperNetwork(Common):
    """Makes factors from codes, by a head for every shape of linear.

    Shapes: `tasks (tasks, code)`, `languages (languages, code)`, and heads from `source` to `rank * features`.

    A head averages over what it reads, so that a step moves the factors it makes about as far as a step moves LoRA's;
    summing, at the rates that suit LoRA, it diverges. A starts at LoRA's random numbers, the same for all linears of a
    shape, which the codes then move.
    """

    codes = ("tasks", "languages")
    task_of: Tensor
    language_of: Tensor

    def __init__(self, config: Hyper, shapes: Iterable[Shape]) -> None:
        super().__init__()
        self.rank, self.invariant = config.rank, config.magnitude_invariant
        self.tasks = nn.Parameter(torch.empty(1 + max(config.tasks), config.code))
        self.languages = nn.Parameter(torch.empty(1 + max(config.languages), config.code))
        width = 3 * config.code * (2 if self.invariant else 1)
        self.source = nn.Sequential(nn.Linear(width, config.source), nn.ReLU(), nn.Linear(config.source, config.source))
        sizes = sorted(set(shapes))
        self.down = nn.ModuleDict({_key(shape): self._head(config, shape[0]) for shape in sizes})
        self.up = nn.ModuleDict({_key(shape): self._head(config, shape[1]) for shape in sizes})
        self.register_buffer("task_of", torch.tensor(config.tasks), persistent=False)
        self.register_buffer("language_of", torch.tensor(config.languages), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Codes and the source start with numbers of about one, the heads' weights small, and those of B at zero."""
        nn.init.normal_(self.tasks)
        nn.init.normal_(self.languages)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and not name.startswith("up."):
                nn.init.normal_(parameter, std=0.01 if name.startswith("down.") else parameter.shape[1] ** -0.5)
            elif name.startswith("down."):
                bound = math.sqrt(self.rank / len(parameter))
                nn.init.uniform_(parameter, -bound, bound)
            elif "." in name:
                nn.init.zeros_(parameter)

    def forward(self, weights: Tensor, layer: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Factors `(decisions, rank, features)` of a layer with code `(code,)`, for `weights (decisions, experts)`."""
        codes = [
            weights @ self.tasks[self.task_of],
            weights @ self.languages[self.language_of],
            layer.expand(len(weights), -1),
        ]
        code = torch.cat(codes, dim=-1)
        source = self.source(torch.cat([code.cos(), code.sin()], dim=-1) if self.invariant else code)
        source = source / source.shape[-1]
        down, up = (heads[_key(shape)](source).unflatten(-1, (self.rank, -1)) for heads in (self.down, self.up))
        return down, up

    @staticmethod
    def _head(config: Hyper, features: int) -> nn.Linear:
        return nn.Linear(config.source, config.rank * features, bias=not config.magnitude_invariant)


class HyperBank(GeneratedBank):
    """Shapes: `layer (code,)` and, where the network's output is added to them, `down (rank, in_features)` and
    `up (rank, out_features)`."""

    def __init__(self, config: Hyper, in_features: int, out_features: int) -> None:
        super().__init__(config.experts)
        self.shape = in_features, out_features
        self.layer = nn.Parameter(torch.empty(config.code))
        own = config.magnitude_invariant
        self.down = nn.Parameter(torch.empty(config.rank, in_features)) if own else None
        self.up = nn.Parameter(torch.empty(config.rank, out_features)) if own else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A code of its own for every layer; LoRA's A and B."""
        nn.init.normal_(self.layer)
        if self.down is not None and self.up is not None:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            nn.init.zeros_(self.up)

    def blended(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        down, up = self.common(weights, self.layer, self.shape)
        if self.down is None or self.up is None:
            return down, up
        return self.down + down, self.up + up


class TemplateNetwork(Common):
    """A task's code becomes two templates by a linear map of low rank.

    Shapes: `tasks (experts, code)`, `squeeze (hidden, code)`, and `down` and `up (template_rank * template_width,
    hidden)`.
    """

    codes = ("tasks",)

    def __init__(self, config: Template) -> None:
        super().__init__()
        self.rank, entries = config.template_rank, config.template_rank * config.template_width
        self.tasks = nn.Parameter(torch.empty(config.experts, config.code))
        self.squeeze = nn.Linear(config.code, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, entries, bias=False)
        self.up = nn.Linear(config.hidden, entries, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The template of A has entries of deviation one, that of B is zero."""
        nn.init.normal_(self.tasks)
        for linear in (self.squeeze, self.down):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Templates `(decisions, template_rank, template_width)` of A and B, for `weights (decisions, experts)`."""
        code = self.squeeze(weights @ self.tasks)
        down, up = (head(code).unflatten(-1, (self.rank, -1)) for head in (self.down, self.up))
        return down, up


class TemplateBank(GeneratedBank):
    """Scaling kernels, shapes: `down (stretch, in_blocks)` and `up (stretch, out_blocks)`; a factor is the Kronecker
    product of its kernel and its template, cut to length."""

    def __init__(self, config: Template, in_features: int, out_features: int) -> None:
        super().__init__(config.experts)
        self.in_features, self.out_features = in_features, out_features
        blocks = (math.ceil(features / config.template_width) for features in (in_features, out_features))
        stretch = config.rank // config.template_rank
        self.down, self.up = (nn.Parameter(torch.empty(stretch, count)) for count in blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A gets the spread of LoRA's A."""
        nn.init.uniform_(self.down, -(self.in_features**-0.5), self.in_features**-0.5)
        nn.init.normal_(self.up)

    def blended(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        down, up = self.common(weights)
        return _stretched(self.down, down, self.in_features), _stretched(self.up, up, self.out_features)


def _stretched(kernel: Tensor, template: Tensor, features: int) -> Tensor:
    """Kronecker products of a kernel `(p, q)` and templates `(n, r, w)`: `(n, p * r, features)`."""
    return torch.einsum("pq,nrw->nprqw", kernel, template).flatten(3).flatten(1, 2)[..., :features]


def _key(shape: Shape) -> str:
    return "{}x{}".format(*shape)
