"""Methods by name: presets over the shared blocks, found in `presets/` and in the `loramux.methods` entry points."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal

import pydantic

from ..routing import Granularity
from ..support.config import config
from ..support.errors import ConfigError, did_you_mean
from .branch import BranchConfig

TaskNames = tuple[str, ...]


def numbered_tasks(count: int) -> TaskNames:
    """Names for tasks that have none yet."""
    return tuple(f"task{number}" for number in range(1, count + 1))


@config
class StageConfig:
    """One stage of training.

    Attributes:
        name: shown in logs.
        share: part of all steps, relative to the other stages.
        train: which parameters move.
        route: `task` sends every row to its own task's expert, whatever the router says, so that experts train alone.
        reduction: `token` averages the loss over all answer tokens of the batch; `task` sums each task's own mean, so
            that experts of different tasks train as they would alone.
        preferences: a blend of tasks is drawn at every step, which both routes every row and weights the tasks' losses.
            `annealed` goes from even blends to single tasks; `uniform` draws from the whole simplex.
        consistency: weight of the divergence between two passes whose routers draw at random anew.
        after: what happens to the adapter when the stage has ended. `reset_experts` makes all experts new,
            `fit_prototypes` sets the prototypes of routers that have some.
    """

    name: str = "train"
    share: float = 1.0
    train: tuple[Literal["experts", "router"], ...] = ("experts", "router")
    route: Literal["learned", "task"] = "learned"
    reduction: Literal["token", "task"] = "token"
    preferences: Literal["annealed", "uniform"] | None = None
    consistency: float = 0.0
    after: tuple[Literal["reset_experts", "fit_prototypes"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What a preset builds.

    Attributes:
        branches: at every adapted linear.
        stages: that train them, one after the other.
        by_depth: where layers differ, the branches of each section of the model from its input to its output; the
            sections hold equally many layers, and their branches differ in sizes alone.
        in_blocks: where experts go through feed-forward blocks, the branches of the linears in them; `branches` are
            then those of the others.
        router_rate, task_logit_rate: how many times as fast as experts its routers learn, and its per-task logits,
            where a recipe gives no learning rates of their own.
    """

    branches: tuple[BranchConfig, ...]
    stages: tuple[StageConfig, ...] = field(default=(StageConfig(),))
    by_depth: tuple[tuple[BranchConfig, ...], ...] = ()
    in_blocks: tuple[BranchConfig, ...] = ()
    router_rate: float = 1.0
    task_logit_rate: float = 10.0

    def __post_init__(self) -> None:
        if any(branch.through_block for branch in self.branches):
            raise ValueError("branches whose router is that of a feed-forward block belong to in_blocks")
        if not all(branch.through_block or branch.router is None for branch in self.in_blocks):
            raise ValueError("branches in a feed-forward block are routed by the block's router or not at all")

    def at(self, depth: float, *, in_block: bool = False) -> tuple[BranchConfig, ...]:
        """The branches of a linear at `depth`, which is 0 at the first layer and below 1, in a block or elsewhere."""
        if in_block and self.in_blocks:
            return self.in_blocks
        return self.by_depth[int(depth * len(self.by_depth))] if self.by_depth else self.branches

    @property
    def granularity(self) -> Granularity:
        return max(branch.granularity for branch in self.everywhere)

    @property
    def everywhere(self) -> tuple[BranchConfig, ...]:
        """The branches of all kinds of linears."""
        return self.branches + self.in_blocks

    @property
    def exports_exactly(self) -> bool:
        """Whether every task leaves as a plain LoRA without loss."""
        return self.granularity < Granularity.TOKEN


@dataclass(frozen=True)
class Method:
    """A registered preset.

    Attributes:
        name: the paper's name in lower case.
        build: `build(tasks, **options) -> MethodConfig`, where `tasks` are names; its keyword defaults are the paper's.
        paper: where it comes from.
    """

    name: str
    build: Callable[..., MethodConfig]
    paper: str

    @property
    def summary(self) -> str:
        """The first sentence of the preset's docstring."""
        return (inspect.getdoc(self.build) or "").split("\n\n")[0].replace("\n", " ")

    def options(self) -> dict[str, Any]:
        """Every option with its default."""
        parameters = list(inspect.signature(self.build).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}


_METHODS: dict[str, Method] = {}


def register_method(name: str, *, paper: str) -> Callable[[Callable[..., MethodConfig]], Callable[..., MethodConfig]]:
    """Register a preset under `name`.

    Raises:
        ValueError: when the name is taken.
    """

    def register(build: Callable[..., MethodConfig]) -> Callable[..., MethodConfig]:
        if name in _METHODS:
            raise ValueError(f"there is already a method called {name!r}, in {_METHODS[name].build.__module__}")
        _METHODS[name] = Method(name, pydantic.validate_call(build), paper)
        return build

    return register


def methods() -> Mapping[str, Method]:
    """All methods by name: ours, and those other packages offer under the entry point group `loramux.methods`."""
    package = importlib.import_module(f"{__package__}.presets")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in entry_points(group="loramux.methods"):
        entry.load()
    return dict(sorted(_METHODS.items()))


def method_config(name: str, *, tasks: Sequence[str], options: Mapping[str, Any] | None = None) -> MethodConfig:
    """Build a method.

    Raises:
        ConfigError: for an unknown method or option (the nearest valid one is named), or a value out of range.
    """
    method = find_method(name)
    given = dict(options or {})
    for option in given:
        if option not in method.options():
            raise ConfigError(f"method {name!r}: unknown option {option!r}; {did_you_mean(option, method.options())}")
    try:
        return method.build(tuple(tasks), **given)
    except pydantic.ValidationError as error:
        raise ConfigError(f"method {name!r}: {'; '.join(map(_described, error.errors()))}") from None
    except ValueError as error:
        raise ConfigError(f"method {name!r}: {error}") from None


def _described(fault: Any) -> str:
    """One fault of an option or, where options do not fit each other, of what was to be built of them."""
    if not fault["loc"]:
        return str(fault["msg"]).removeprefix("Value error, ")
    return f"{fault['loc'][-1]}: {fault['msg']} (got {fault['input']!r})"


def find_method(name: str) -> Method:
    """Raises ConfigError, with the nearest name, when there is no such method."""
    known = methods()
    if name not in known:
        raise ConfigError(f"unknown method {name!r}; {did_you_mean(name, known)}")
    return known[name]
