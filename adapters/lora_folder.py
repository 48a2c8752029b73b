"""Reading a plain LoRA that others made, from its PEFT folder.

The folder is taken as hostile: no file is unpickled, every size is checked before anything of that size is read, and
whatever is more than a plain LoRA on linears of the given base is refused with the reason. What the config means (which
modules, which rank and scale each) is not guessed: stock PEFT adapts a copy of the base that has no memory.
"""

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as StockLinear
from peft.tuners.lora import LoraLayer
from pydantic import Field, FiniteFloat
from safetensors import SafetensorError, safe_open
from torch import nn

from ..support.config import config, parse
from ..support.errors import AdapterError, ConfigError
from .low_rank import LowRank

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_LARGEST_CONFIG = 1 << 20
_LONGEST = 160
_MOST_REPEATS = 3
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
        layers = self.layers_pattern or []
        for pattern in (*patterns, *([layers] if isinstance(layers, str) else layers)):
            _check_pattern(pattern)


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


def read_lora(folder: Path, base: nn.Module, *, base_names: Collection[str] = ()) -> PlainLora:
    """Read a PEFT LoRA folder.

    Args:
        base: the transformers model it is for, bare or in a hub.
        base_names: what an adapter of this base may call it (Hub ids, folders). An adapter that names another base is
            refused, one that names none is not; without any name here nothing is compared.

    Raises:
        AdapterError: the folder holds no plain LoRA of this base, or a file is damaged, too large or not finite.
    """
    data = _read_config(folder / CONFIG)
    _refuse_more_than_lora(data, folder)
    named = data.get("base_model_name_or_path") or None
    _check_base(named, base_names, folder)
    layers = _stock_layers(_settings(data, folder), base, folder)
    path = _weights_file(folder)
    factors = _read_factors(path, layers, base)
    with path.open("rb") as file:
        return PlainLora(factors, named, hashlib.file_digest(file, "sha256").hexdigest())


def declared_base(folder: Path) -> str | None:
    """The name that an adapter's config gives of its base, if it gives one.

    Raises:
        AdapterError: there is no readable config.
    """
    return _read_config(folder / CONFIG).get("base_model_name_or_path") or None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a device has no end
        raise AdapterError(f"{path.parent}: no PEFT adapter (no {CONFIG} in it)")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise AdapterError(f"{path}: {path.stat().st_size} bytes; no adapter's config is larger than 1 MiB")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({type(error).__name__}: {_short(str(error))})") from None
    if not isinstance(data, dict):
        raise AdapterError(f"{path}: not a JSON object")
    named = data.get("base_model_name_or_path")
    if not isinstance(named, str | None):
        raise AdapterError(f"{path}: base_model_name_or_path must be a name, got {_short(repr(named))}")
    return data


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


def _check_pattern(pattern: str) -> None:
    """Refuse regular expressions that could run for ages: Python's have no time limit."""
    repeats = re.findall(r"[*+{]", pattern)
    if re.search(r"\)[*+{]", pattern) or len(repeats) > _MOST_REPEATS:
        raise ValueError(f"the pattern {_short(pattern)!r} repeats a group, or repeats more than {_MOST_REPEATS} times")


def _check_base(named: str | None, base_names: Collection[str], folder: Path) -> None:
    if named is not None and base_names and _place(named) not in {_place(name) for name in base_names}:
        raise AdapterError(
            f"{folder}: an adapter of another base: it names {_short(named)!r}, this one is "
            f"{' or '.join(map(repr, sorted(base_names)))}"
        )


def _place(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _stock_layers(settings: _Settings, base: Any, folder: Path) -> dict[str, StockLinear]:
    """What stock PEFT would adapt in the base, by module name: layers that tell rank and scale, without memory."""
    given = {field.name: getattr(settings, field.name) for field in fields(_Settings)}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = type(base)(copy.deepcopy(base.config))
            # No start is made: some would compute with the base's weights.
            inject_adapter_in_model(LoraConfig(init_lora_weights=False, **options), model, _ADAPTER)
    except (ValueError, TypeError, RuntimeError, re.error) as error:
        reason = _short(" ".join(str(error).split()) or type(error).__name__)
        raise AdapterError(f"{folder}: PEFT cannot put it on this base ({type(base).__name__}): {reason}") from None
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        if type(layer) is not StockLinear:
            kind = type(layer.get_base_layer()).__name__
            raise AdapterError(f"{folder}: adapts {name!r}, which is a {kind}; experts act on linear layers only")
    return layers  # type: ignore[return-value]


def _weights_file(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / PICKLED).is_file():
        raise AdapterError(
            f"{folder}: its weights are pickled ({PICKLED}), and reading a pickle can run any code; load it where you "
            f"trust it and save it again, which writes {WEIGHTS}"
        )
    raise AdapterError(f"{folder}: no {WEIGHTS} in it")


def _read_factors(path: Path, layers: Mapping[str, StockLinear], base: nn.Module) -> dict[str, LowRank]:
    try:
        with safe_open(path, "pt") as saved:
            _check_tensors(path, saved, layers, base)
            return {name: _folded(path, saved, name, layer.scaling[_ADAPTER]) for name, layer in layers.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file ({_short(str(error))})") from None


def _check_tensors(path: Path, saved: Any, layers: Mapping[str, StockLinear], base: nn.Module) -> None:
    """Compare the names and shapes in a file's header with what the layers want, before a tensor of theirs is read."""
    wanted = {
        _tensor_name(name, factor): tuple(getattr(layer, f"lora_{factor}")[_ADAPTER].weight.shape)
        for name, layer in layers.items()
        for factor in "AB"
    }
    found = set(saved.keys())
    for name in sorted({*found, *wanted}):
        if name not in found:
            raise AdapterError(f"{path}: tensor {name!r} is missing")
        header = saved.get_slice(name)
        if name not in wanted:
            if _is_copy_of_base(name, saved, base):
                continue
            raise AdapterError(
                f"{path}: holds a tensor {_short(name)!r}, which is no part of a plain LoRA of this base"
            )
        if tuple(header.get_shape()) != wanted[name]:
            raise AdapterError(
                f"{path}: tensor {name!r} has shape {tuple(header.get_shape())}; its config and this base want "
                f"{wanted[name]}"
            )
        if not header.get_dtype().startswith(("F", "BF")):
            raise AdapterError(f"{path}: tensor {name!r} holds {header.get_dtype()}, not floating point numbers")


def _is_copy_of_base(name: str, saved: Any, base: nn.Module) -> bool:
    """Whether a tensor is just what the base has; PEFT saves embeddings along with LoRAs that act on them."""
    own = {key.replace(".base_layer.", "."): parameter for key, parameter in base.named_parameters()}
    parameter = own.get(name.removeprefix(_PREFIX).replace(".base_layer.", "."))
    if parameter is None or tuple(saved.get_slice(name).get_shape()) != tuple(parameter.shape):
        return False
    return torch.equal(saved.get_tensor(name).to(parameter.dtype), parameter.detach().cpu())


def _folded(path: Path, saved: Any, name: str, scale: float) -> LowRank:
    down, up = (saved.get_tensor(_tensor_name(name, factor)) for factor in "AB")
    pair = LowRank(down.float(), (up.double() * scale).float())
    if not (pair.down.isfinite().all() and pair.up.isfinite().all()):
        raise AdapterError(f"{path}: the update of {name!r} has values that are not finite")
    return pair


def _tensor_name(module: str, factor: str) -> str:
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def _short(text: str) -> str:
    """A stranger's words, at a length that fits a message."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
