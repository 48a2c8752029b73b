"""Methods by name: presets over the shared blocks, found in `presets/` and in the `loramux.methods` entry points."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal

import pydantic

from ..routing import Granularity
from ..support.config import config
from ..support.errors import ConfigError, did_you_mean
from .branch import BranchConfig


@config
class StageConfig:
    """One stage of training.

    Attributes:
        name: shown in logs.
        share: part of all steps, relative to the other stages.
        train: which parameters move.
        reduction: `token` averages the loss over all answer tokens of the batch; `task` sums each task's own mean, so
            that experts of different tasks train as they would alone.
    """

    name: str = "train"
    share: float = 1.0
    train: tuple[Literal["experts", "router"], ...] = ("experts", "router")
    reduction: Literal["token", "task"] = "token"


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What a preset builds: the branches at every adapted linear, and the stages that train them."""

    branches: tuple[BranchConfig, ...]
    stages: tuple[StageConfig, ...] = field(default=(StageConfig(),))

    @property
    def granularity(self) -> Granularity:
        return max(branch.granularity for branch in self.branches)

    @property
    def exports_exactly(self) -> bool:
        """Whether every task leaves as a plain LoRA without loss."""
        return self.granularity < Granularity.TOKEN


@dataclass(frozen=True)
class Method:
    """A registered preset.

    Attributes:
        name: the paper's name in lower case.
        build: `build(num_tasks, **options) -> MethodConfig`; its keyword defaults are the paper's.
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


def method_config(name: str, *, num_tasks: int, options: Mapping[str, Any] | None = None) -> MethodConfig:
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
        return method.build(num_tasks, **given)
    except pydantic.ValidationError as error:
        faults = "; ".join(f"{fault['loc'][-1]}: {fault['msg']} (got {fault['input']!r})" for fault in error.errors())
        raise ConfigError(f"method {name!r}: {faults}") from None
    except ValueError as error:
        raise ConfigError(f"method {name!r}: {error}") from None


def find_method(name: str) -> Method:
    """Raises ConfigError, with the nearest name, when there is no such method."""
    known = methods()
    if name not in known:
        raise ConfigError(f"unknown method {name!r}; {did_you_mean(name, known)}")
    return known[name]
