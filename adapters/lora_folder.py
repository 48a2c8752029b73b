"""Reading a plain LoRA that others made, from its PEFT folder.

The folder is taken as hostile: no file is unpickled, every size is checked before anything of that size is read, and
whatever is more than a plain LoRA on linears of the given base is refused with the reason. Which modules a config
means is not guessed: stock PEFT adapts a copy of the base that has no memory.
"""

import copy
import hashlib
import json
import math
import os
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as StockLinear
from peft.tuners.lora import LoraLayer
from pydantic import Field, FiniteFloat
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn

from ..support.config import config, parse, to_data
from ..support.errors import AdapterError, ConfigError
from .low_rank import LowRank

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_LARGEST_CONFIG = 1 << 20
_LARGEST_HEADER = 1 << 20
_KEPT_TARGETS = 64
_LONGEST = 160
_MOST_REPEATS = 3
_MOST_PATTERNS = 2048
_ADAPTER = "default"
_PREFIX = "base_model.model."

_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "runtime_config", "eva_config", "init_lora_weights"),
}
"""Keys of an adapter's config that do not change what the saved weights mean, or are looked at on their own."""
_REASONS = {
    "use_dora": "DoRA also rescales the base's own weights, which no plain LoRA does",
    "bias": "it changed biases of the base",
    "lora_bias": "it has a bias beside B",
    "modules_to_save": "it holds whole modules that were trained beside the LoRA",
    "layer_replication": "it is for a base with layers repeated",
    "trainable_token_indices": "it changed token embeddings",
    "target_parameters": "it adapts parameters that are no linear layers",
    "alora_invocation_tokens": "it acts only after certain tokens",
}
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")

_Rank = Annotated[int, Field(ge=1, le=1 << 16)]
_Value = TypeVar("_Value")


@config
class _Settings:
    """What says where a LoRA acts, and how strongly."""

    r: _Rank = 8
    lora_alpha: FiniteFloat = 8
    use_rslora: bool = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    target_modules: list[str] | str
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        given = (self.target_modules, self.exclude_modules)
        patterns = [*(self.rank_pattern or {}), *(self.alpha_pattern or {}), *(p for p in given if isinstance(p, str))]
        if len(patterns) > _MOST_PATTERNS:
            raise ValueError(f"{len(patterns)} patterns of module names; at most {_MOST_PATTERNS} are read")
        layers = self.layers_pattern or []
        for pattern in (*patterns, *([layers] if isinstance(layers, str) else layers)):
            _check_pattern(pattern)

    @property
    def targets(self) -> "_Settings":
        """The part that says where it acts."""
        return replace(self, r=1, lora_alpha=1, use_rslora=False, rank_pattern=None, alpha_pattern=None)

    def strengths(self, modules: Iterable[str]) -> Iterator[tuple[int, float]]:
        """Rank and scale at modules, as stock PEFT reads them."""
        rank_of, alpha_of = _first_fit(self.rank_pattern or {}), _first_fit(self.alpha_pattern or {})
        for module in modules:
            rank, alpha = rank_of(module, self.r), alpha_of(module, self.lora_alpha)
            yield rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


class AnotherBase(AdapterError):
    """An adapter that names another base."""


class TooLarge(AdapterError):
    """An adapter whose weights file is larger than it may be."""


@dataclass(frozen=True)
class PlainLora:
    """A LoRA as what it adds to each linear.

    Attributes:
        factors: by module name of the base, in float32, with the scale (alpha over rank, or over its root) in B.
        base: the name its config gives of its base, if it gives one.
        sha256: of its weights file.
    """

    factors: Mapping[str, LowRank]
    base: str | None
    sha256: str

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max(pair.rank for pair in self.factors.values())


@dataclass(frozen=True)
class LinearPlan:
    """What a LoRA has for one linear: its rank, the scale that its config gives it, and the linear's sizes."""

    rank: int
    scale: float
    in_features: int
    out_features: int

    @property
    def down(self) -> tuple[int, int]:
        """The shape of A."""
        return self.rank, self.in_features

    @property
    def up(self) -> tuple[int, int]:
        """The shape of B."""
        return self.out_features, self.rank


@dataclass(frozen=True)
class LoraPlan:
    """What the config of a PEFT folder promises, before any weights are read.

    Attributes:
        linears: by module name of the base.
        base: the name the config gives of its base, if it gives one.
        config_sha256: of the config file.
    """

    folder: Path
    linears: Mapping[str, LinearPlan]
    base: str | None
    config_sha256: str

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max(linear.rank for linear in self.linears.values())


class LoraReader:
    """Reads PEFT LoRA folders for one base, from several threads if need be.

    Which modules PEFT finds for a config is kept for the next adapter of the same modules: it takes most of the time.

    Args:
        base: the transformers model they are for, bare or in a hub.
        base_names: what an adapter of this base may call it (Hub ids, folders). An adapter that names another base is
            refused, one that names none is not; without any name here nothing is compared.
        most_bytes: the largest weights file to read; None sets no limit beside what config and base want.
    """

    def __init__(self, base: nn.Module, *, base_names: Collection[str] = (), most_bytes: int | None = None) -> None:
        self._base, self._base_names, self._most_bytes = base, {_place(name) for name in base_names}, most_bytes
        self._targets: OrderedDict[str, Mapping[str, tuple[int, int]]] = OrderedDict()
        self._lock = threading.Lock()

    def plan(self, folder: Path) -> LoraPlan:
        """Read and judge the config; of the weights only whether they are there, and not pickled.

        Raises:
            AnotherBase: it names another base.
            AdapterError: it is of no plain LoRA of this base.
        """
        raw, data = read_config(folder / CONFIG)
        _refuse_more_than_lora(data, folder)
        named = data.get("base_model_name_or_path") or None
        self._check_base(named, folder)
        linears = self._linears(_settings(data, folder), folder)
        _weights_file(folder)
        return LoraPlan(folder, linears, named, hashlib.sha256(raw).hexdigest())

    def check_whole(self, plan: LoraPlan) -> None:
        """Compare the size of the weights file with what its header announces; no weights are read.

        Raises:
            AdapterError: it is cut short or no safetensors file.
        """
        path = _weights_file(plan.folder)
        with whole_safetensors(path), safe_open(path, "pt"):
            pass

    def read(self, plan: LoraPlan) -> PlainLora:
        """Read the weights of a plan. The file is read whole before it is looked at: one that is cut short meanwhile
        would otherwise end the process.

        Raises:
            TooLarge: the file is larger than it may be.
            AdapterError: it is damaged, not finite, or not what the config promises.
        """
        path = _weights_file(plan.folder)
        raw = self._read_file(path, plan)
        with whole_safetensors(path):
            saved = load(raw)
        _check_tensors(path, saved, plan.linears, self._base)
        factors = {name: _folded(path, saved, name, linear.scale) for name, linear in plan.linears.items()}
        return PlainLora(factors, plan.base, hashlib.sha256(raw).hexdigest())

    def _check_base(self, named: str | None, folder: Path) -> None:
        if named is not None and self._base_names and _place(named) not in self._base_names:
            raise AnotherBase(
                f"{folder}: an adapter of another base: it names {_short(named)!r}, this one is "
                f"{' or '.join(map(repr, sorted(self._base_names)))}"
            )

    def _linears(self, settings: _Settings, folder: Path) -> Mapping[str, LinearPlan]:
        targets = self._sizes(settings.targets, folder)
        with _put_on(self._base, folder):
            strengths = settings.strengths(targets)
            return {name: LinearPlan(*next(strengths), *sizes) for name, sizes in targets.items()}

    def _sizes(self, targets: _Settings, folder: Path) -> Mapping[str, tuple[int, int]]:
        """Width and height of the linears that are adapted, by module name."""
        key = json.dumps(to_data(targets), sort_keys=True)
        with self._lock:
            if key not in self._targets:
                layers = _stock_layers(targets, self._base, folder)
                self._targets[key] = {name: _sizes_of(layer) for name, layer in layers.items()}
            self._targets.move_to_end(key)
            if len(self._targets) > _KEPT_TARGETS:
                self._targets.popitem(last=False)
            return self._targets[key]

    def _read_file(self, path: Path, plan: LoraPlan) -> bytes:
        most = self._largest(plan) if self._most_bytes is None else min(self._most_bytes, self._largest(plan))
        try:
            with path.open("rb") as file:
                raw = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
        except OSError as error:
            raise AdapterError(f"{path}: cannot be read ({error.strerror})") from None
        if len(raw) > most:
            raise TooLarge(f"{path}: {path.stat().st_size} bytes; at most {most} are allowed for it")
        return raw

    def _largest(self, plan: LoraPlan) -> int:
        """No more than double precision of everything that may be in it; PEFT saves copies of the base's embeddings."""
        own = sum(math.prod(linear.down) + math.prod(linear.up) for linear in plan.linears.values())
        copied = sum(p.numel() for p in self._base.parameters())
        return 8 * (own + copied) + _LARGEST_HEADER


def read_lora(folder: Path, base: nn.Module, *, base_names: Collection[str] = ()) -> PlainLora:
    """Read one PEFT LoRA folder; `base` and `base_names` are as for `LoraReader`.

    Raises:
        AdapterError: the folder holds no plain LoRA of this base, or a file is damaged, too large or not finite.
    """
    reader = LoraReader(base, base_names=base_names)
    return reader.read(reader.plan(folder))


def declared_base(folder: Path) -> str | None:
    """The name that an adapter's config gives of its base, if it gives one.

    Raises:
        AdapterError: there is no readable config.
    """
    return read_config(folder / CONFIG)[1].get("base_model_name_or_path") or None


def read_config(path: Path) -> tuple[bytes, dict[str, Any]]:
    """An adapter_config.json as it is written, and as data; only the name of its base is checked.

    Raises:
        AdapterError: it is missing, too large or no JSON object, or names its base by something else than a name.
    """
    if not path.is_file():  # a device has no end
        raise AdapterError(f"{path.parent}: no PEFT adapter (no {CONFIG} in it)")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise AdapterError(f"{path}: {path.stat().st_size} bytes; no adapter's config is larger than 1 MiB")
    try:
        raw = path.read_bytes()
        data = json.loads(raw.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({type(error).__name__}: {_short(str(error))})") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path}: not a JSON object")
    named = data.get("base_model_name_or_path")
    if not isinstance(named, str | None):
        raise AdapterError(f"{path}: base_model_name_or_path must be a name, got {_short(repr(named))}")
    return raw, data


def _refuse_more_than_lora(data: Mapping[str, Any], folder: Path) -> None:
    kind = data.get("peft_type")
    if kind != "LORA":
        hint = "; name it in train.start_from as it is" if kind == "LORAMUX" else ""
        raise AdapterError(f"{folder}: of PEFT type {_short(str(kind))}; only LORA can be imported{hint}")
    start = data.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        raise AdapterError(
            f"{folder}: started by {_short(repr(start))}, which changes the base's own weights; save it as a plain "
            "LoRA first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    read = {field.name for field in fields(_Settings)}
    defaults = {field.name: field.default for field in fields(LoraConfig)}
    for key, value in data.items():
        if key in read or key in _HARMLESS or not value or value == defaults.get(key):
            continue
        reason = _REASONS.get(key, "which makes it more than a plain LoRA, or is not known to this version")
        raise AdapterError(f"{folder}: cannot be imported, it has {_short(key)} = {_short(repr(value))}: {reason}")


def _settings(data: Mapping[str, Any], folder: Path) -> _Settings:
    known = {field.name for field in fields(_Settings)}
    try:
        return parse(_Settings, {k: v for k, v in data.items() if k in known}, where=str(folder / CONFIG))
    except ConfigError as error:
        raise AdapterError(str(error)) from None


def _first_fit(values: Mapping[str, _Value]) -> Callable[[str, _Value], _Value]:
    """Looks a module up by patterns of names, of which the first that fits counts. Stock PEFT's own look-up compiles
    each pattern anew for every module once there are more than a few hundred."""
    patterns = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in values.items()]

    def look_up(module: str, default: _Value) -> _Value:
        return next((value for pattern, value in patterns if pattern.match(module)), default)

    return look_up


def _check_pattern(pattern: str) -> None:
    """Refuse regular expressions that could run for ages: Python's have no time limit."""
    repeats = re.findall(r"[*+{]|(?<![(*+}?])\?", pattern)  # not that of `(?:` and of lazy repeats
    if re.search(r"\)[*+{]", pattern) or len(repeats) > _MOST_REPEATS:
        raise ValueError(f"the pattern {_short(pattern)!r} repeats a group, or repeats more than {_MOST_REPEATS} times")


def _place(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _stock_layers(targets: _Settings, base: Any, folder: Path) -> dict[str, StockLinear]:
    """What stock PEFT would adapt in the base, by module name, without memory."""
    given = {field.name: getattr(targets, field.name) for field in fields(_Settings)}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    with _put_on(base, folder), torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = type(base)(copy.deepcopy(base.config))
        # No start is made: some would compute with the base's weights.
        inject_adapter_in_model(LoraConfig(init_lora_weights=False, **options), model, _ADAPTER)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        if type(layer) is not StockLinear:
            kind = type(layer.get_base_layer()).__name__
            raise AdapterError(f"{folder}: adapts {name!r}, which is a {kind}; experts act on linear layers only")
    return layers  # type: ignore[return-value]


def _sizes_of(layer: StockLinear) -> tuple[int, int]:
    assert layer.in_features is not None
    assert layer.out_features is not None
    return layer.in_features, layer.out_features


@contextmanager
def _put_on(base: nn.Module, folder: Path) -> Iterator[None]:
    """What PEFT says against putting an adapter on a base, as our error."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, re.error) as error:
        reason = _short(" ".join(str(error).split()) or type(error).__name__)
        raise AdapterError(f"{folder}: PEFT cannot put it on this base ({type(base).__name__}): {reason}") from None


def _weights_file(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / PICKLED).is_file():
        raise AdapterError(
            f"{folder}: its weights are pickled ({PICKLED}), and reading a pickle can run any code; load it where you "
            f"trust it and save it again, which writes {WEIGHTS}"
        )
    raise AdapterError(f"{folder}: no {WEIGHTS} in it")


@contextmanager
def whole_safetensors(path: Path) -> Iterator[None]:
    """Reading a safetensors file in the block.

    Raises:
        AdapterError: it is cut short, or something else.
        MemoryError: as it says.
    """
    try:
        yield
    except (SafetensorError, KeyError, ValueError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file ({_short(str(error))})") from None
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise MemoryError(f"{path}: {_short(str(error))}") from None  # safetensors panics where memory is out


def _check_tensors(path: Path, saved: Mapping[str, Tensor], linears: Mapping[str, LinearPlan], base: nn.Module) -> None:
    """Compare names and shapes with what the config promises."""
    wanted = {
        _tensor_name(name, factor): shape
        for name, linear in linears.items()
        for factor, shape in (("A", linear.down), ("B", linear.up))
    }
    for name in sorted({*saved, *wanted}):
        if name not in saved:
            raise AdapterError(f"{path}: tensor {name!r} is missing")
        tensor = saved[name]
        if name not in wanted:
            if _is_copy_of_base(name, tensor, base):
                continue
            raise AdapterError(
                f"{path}: holds a tensor {_short(name)!r}, which is no part of a plain LoRA of this base"
            )
        if tuple(tensor.shape) != wanted[name]:
            raise AdapterError(
                f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}; its config and this base want {wanted[name]}"
            )
        if not tensor.is_floating_point():
            raise AdapterError(f"{path}: tensor {name!r} holds {tensor.dtype}, not floating point numbers")


def _is_copy_of_base(name: str, tensor: Tensor, base: nn.Module) -> bool:
    """Whether a tensor is just what the base has; PEFT saves embeddings along with LoRAs that act on them."""
    own = {key.replace(".base_layer.", "."): parameter for key, parameter in base.named_parameters()}
    parameter = own.get(name.removeprefix(_PREFIX).replace(".base_layer.", "."))
    if parameter is None or parameter.is_meta or tensor.shape != parameter.shape:
        return False
    plain = parameter.to_dense() if parameter.is_mkldnn else parameter.detach().cpu()
    return torch.equal(tensor.to(parameter.dtype), plain)


def _folded(path: Path, saved: Mapping[str, Tensor], name: str, scale: float) -> LowRank:
    down, up = (saved[_tensor_name(name, factor)] for factor in "AB")
    pair = LowRank(down.float(), (up.double() * scale).float())
    if not (all_finite(pair.down) and all_finite(pair.up)):
        raise AdapterError(f"{path}: the update of {name!r} has values that are not finite")
    return pair


def all_finite(values: Tensor) -> bool:
    """As `values.isfinite().all()`, in a seventh of the time."""
    return all(map(math.isfinite, values.aminmax()))  # which both are NaN where any value is


def _tensor_name(module: str, factor: str) -> str:
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def _short(text: str) -> str:
    """A stranger's words, at a length that fits a message."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
