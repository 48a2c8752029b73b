"""A run, written down: one validated recipe in YAML, Python or `--set key=value`."""

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..support.config import apply_overrides, config, load_yaml, parse, to_data
from ..support.errors import ConfigError
from ..support.identity import BaseIdentity
from ..tasks import MixtureConfig

BUNDLED_TASKS = "default"
Precision = Literal["fp32", "bf16", "fp16"]


@config
class BaseConfig:
    """The frozen model: the bundled base's name, a Hugging Face id or a folder."""

    model: str = "loramux/tiny"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    known_as: str | None = None
    """The Hub id that a local folder is a copy of; adapters name their base by it."""
    also_called: tuple[str, ...] = ()
    """Other names under which LoRAs that are imported may name this base: mirrors, folders of other machines."""


@config
class MethodChoice:
    """What is added to it: a method by name (`loramux methods` lists them) and the options it takes."""

    name: str = "moa"
    options: dict[str, Any] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] = "all-linear"
    excess_rank: bool = False
    """Let experts have a higher rank than a linear they adapt can hold."""

    def lora(self, rank: int) -> "MethodChoice":
        """A plain LoRA on the same linears; nobody chose its rank, so it may be more than they can hold."""
        return MethodChoice(name="lora", options={"rank": rank}, target_modules=self.target_modules, excess_rank=True)


@config
class TrainConfig:
    """How it is trained. Sizes are global: the same numbers mean the same run on one or many processes."""

    steps: int = 400
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 2e-3
    router_learning_rate: float | None = None
    """None: as the method says, the learning rate in most."""
    task_logit_learning_rate: float | None = None
    """None: as the method says, 10 to 50 times the learning rate (scores per task need larger steps than weights)."""
    weight_decay: float = 0.0
    warmup_ratio: float = 0.06
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float | None = 1.0
    precision: Precision = "fp32"
    """What the forward pass computes in; adapters, routers and losses stay in fp32."""
    gradient_checkpointing: bool = False
    compile: bool = False
    max_length: int | None = None
    """None: what the model takes."""
    eval_every: int | None = None
    """Steps between evaluations; None: a quarter of the run."""
    save_every: int | None = None
    """Steps between checkpoints; None: a quarter of the run."""
    keep_checkpoints: int = 2
    early_stop: int | None = None
    """Stop after this many evaluations in a row without a better mean metric."""
    log_every: int = 10
    log_gradients: int | None = None
    """Steps between looks at how well the tasks' gradients agree, each at the cost of a step; None: never."""
    trackers: tuple[str, ...] = ()
    """Accelerate's names: tensorboard, wandb, mlflow, ..."""
    seed: int = 0
    distributed: Literal["ddp", "fsdp"] = "ddp"
    """What several processes share: copies (ddp) or fully sharded weights (fsdp)."""
    only_tasks: tuple[str, ...] | None = None
    """Train the experts of these tasks; the others keep their weights bit for bit (methods with an expert per task).
    With none here no expert is trained, only what chooses between them."""
    start_from: str | dict[str, str] | None = None
    """A finished run or mixture folder whose experts to start from, matched by task name; or by task name PEFT LoRAs
    (folders, or Hub ids `owner/name` or `owner/name@revision`) that become its expert."""

    def __post_init__(self) -> None:
        _at_least_one(self, "steps", "batch_size", "accumulation", "log_every", "keep_checkpoints")
        _at_least_one(self, "eval_every", "save_every", "early_stop", "max_length", "log_gradients")
        _above_zero(self, "learning_rate", "router_learning_rate", "task_logit_learning_rate", "clip")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio (={self.warmup_ratio}) must be in [0, 1)")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay (={self.weight_decay}) must be 0 or more")
        if self.log_gradients is not None and self.distributed == "fsdp":
            raise ValueError("log_gradients needs whole weights on every process: set distributed: ddp")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed (={self.seed}) must be in [0, 2**32)")

    @property
    def is_whole(self) -> bool:
        """Whether every task is trained here, and from fresh weights."""
        return self.start_from is None and self.only_tasks is None


@config
class BaselineConfig:
    """The plain LoRA of equal parameter count that is trained beside every method."""

    enabled: bool = True
    learning_rate: float | None = None
    """None: the recipe's learning rate."""

    def __post_init__(self) -> None:
        _above_zero(self, "learning_rate")


@config
class EvaluateConfig:
    """How the result is measured."""

    split: Literal["train", "validation", "test"] = "test"
    limit: int | None = None
    """Examples per task at the end; None: all."""
    during_limit: int | None = 64
    """Validation examples per task while training."""
    batch_size: int = 64
    length_normalised: bool = False
    """Compare closed choices by log-likelihood per token instead of their sum."""

    def __post_init__(self) -> None:
        _at_least_one(self, "limit", "during_limit", "batch_size")


@config
class ExportConfig:
    """Which plain LoRAs leave the run."""

    enabled: bool = True
    allow_lossy: bool = False


@config
class Recipe:
    """Everything a run depends on."""

    base: BaseConfig = field(default_factory=BaseConfig)
    tasks: str | list[dict[str, Any]] = BUNDLED_TASKS
    """A task file, `default`, or the tasks themselves."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    method: MethodChoice = field(default_factory=MethodChoice)
    train: TrainConfig = field(default_factory=TrainConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def baseline_rate(self) -> float:
        """The learning rate of a plain LoRA beside the method."""
        return self.baseline.learning_rate or self.train.learning_rate


def load_recipe(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe; without a path, the default one.

    Paths in the file are relative to the file, paths in overrides to the working directory.

    Args:
        overrides: `dotted.key=value` strings, as `--set` takes them.

    Raises:
        ConfigError: naming the file or the override and the dotted key, with the nearest valid key.
    """
    data: Mapping[str, Any] = {}
    if path is not None:
        data = load_yaml(path) or {}
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path}: a recipe is a mapping of keys, not {type(data).__name__}")
        data = resolve_paths(data, Path(path).absolute().parent)
    merged = apply_overrides(data, overrides)
    return parse(Recipe, resolve_paths(merged, Path.cwd()), where=str(path or "--set"))


def dump_recipe(recipe: Recipe, folder: Path) -> str:
    """The recipe as YAML, its paths relative to `folder` (the folder it is about to be written into)."""
    return yaml.safe_dump(_map_paths(to_data(recipe), lambda p: _relative(p, folder)), sort_keys=False)


def public_recipe(recipe: Recipe, base: BaseIdentity) -> str:
    """The recipe as YAML for readers elsewhere: files and folders by their bare names, the base by its public one."""
    data = _map_paths(to_data(recipe), _bare_name)
    data["base"] |= {"model": base.name, "revision": base.revision, "known_as": None, "also_called": []}
    for source in _sources(data):
        if isinstance(source.get("dataset"), str):
            source["dataset"] = public_place(source["dataset"])
    if isinstance(recipe.train.start_from, dict):
        loras = recipe.train.start_from.items()
        data["train"]["start_from"] = {name: public_place(source) for name, source in loras}
    return yaml.safe_dump(data, sort_keys=False)


def public_place(place: str) -> str:
    """A Hub id as it is, a path of this machine by its bare name."""
    return _bare_name(place) if os.path.isabs(place) or place.startswith((".", "~")) else place


def resolve_paths(data: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Make the relative paths of recipe data absolute; ids (`owner/name`) that are no folder under `root` stay."""
    return _map_paths(data, lambda path: path if os.path.isabs(path) else _absolute(path, root))


def _map_paths(data: Mapping[str, Any], change: Any) -> dict[str, Any]:
    result = copy.deepcopy(dict(data))
    tasks = result.get("tasks")
    if isinstance(tasks, str) and tasks != BUNDLED_TASKS:
        result["tasks"] = change(tasks)
    for source in _sources(result):
        if isinstance(source.get("path"), str):
            source["path"] = change(source["path"])
    for section, key in (("base", "model"), ("train", "start_from")):
        part = result.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            part[key] = change(part[key])
        elif isinstance(part, dict) and isinstance(part.get(key), dict):
            part[key] = {name: change(path) if isinstance(path, str) else path for name, path in part[key].items()}
    return result


def _sources(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sources of tasks that stand in the recipe itself."""
    tasks = data.get("tasks")
    found = [task.get("source") for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []
    return [source for source in found if isinstance(source, dict)]


def _bare_name(path: str) -> str:
    return Path(os.path.normpath(path)).name


def _absolute(path: str, root: Path) -> str:
    candidate = root / path
    return os.path.normpath(candidate) if candidate.exists() or path.startswith(".") else path


def _relative(path: str, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix() if os.path.isabs(path) else path


def _at_least_one(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} (={value}) must be at least 1")


def _above_zero(section: Any, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} (={value}) must be above 0 and finite")
