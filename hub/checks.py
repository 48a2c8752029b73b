"""Looking at adapters that strangers made, before anything of them is used."""

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..adapters import LoramuxConfig, read_lora
from ..adapters.lora_folder import CONFIG, WEIGHTS, read_config, whole_safetensors
from ..bases import base_identity, resolve_base
from ..support.errors import AdapterError, ConfigError, LoramuxError, RemoteError

_MOST_LAYERS = 1000
LORA, MIXTURE_KIND = "LORA", "LORAMUX"


@dataclass(frozen=True)
class AdapterConfig:
    """What a PEFT folder says of itself; nothing of it is checked but that it is there.

    Attributes:
        kind: PEFT's name of it, such as LORA.
        data: the whole config.
    """

    kind: str
    base: str | None
    revision: str | None
    data: dict[str, Any]

    @property
    def named_base(self) -> str:
        """Base and revision in words."""
        return f"{self.base or 'none'}@{self.revision}" if self.revision else self.base or "none"

    @property
    def facts(self) -> dict[str, str]:
        """What tells two adapters apart, in words."""
        targets = self.data.get("target_modules")
        listed = ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets)
        options = self.data.get("options")
        rank = options.get("rank") if isinstance(options, dict) else None
        shown = {
            "kind": self.kind,
            "base": self.base or "none",
            "revision": self.revision or "none",
            "method": self.data.get("method"),
            "rank": self.data.get("r", rank),
            "alpha": self.data.get("lora_alpha"),
            "targets": listed,
        }
        return {key: str(value) for key, value in shown.items() if value is not None}


def listed_adapters(paths: Iterable[str], repository: str) -> list[str]:
    """The folders of a repository's files that hold an adapter; `.` is its root.

    Raises:
        RemoteError: there is none.
    """
    found = sorted(str(path.parent) for path in map(PurePosixPath, paths) if path.name == CONFIG)
    if not found:
        raise RemoteError(f"{repository}: holds no PEFT adapter (no {CONFIG})")
    return found


def read_adapter_config(path: Path) -> AdapterConfig:
    """Read an adapter_config.json.

    Raises:
        AdapterError: it is missing, too large, or no config of an adapter.
    """
    _, data = read_config(path)
    kind, revision = data.get("peft_type"), data.get("revision")
    if not isinstance(kind, str) or not isinstance(revision, str | None):
        told = f"{str(kind)[:80]!r} and {str(revision)[:80]!r}"
        raise AdapterError(f"{path}: peft_type and revision must be names, got {told}")
    return AdapterConfig(kind, data.get("base_model_name_or_path") or None, revision or None, data)


def common_base(configs: Mapping[str, AdapterConfig], remedy: str) -> tuple[str, str | None]:
    """The base that all adapters name, and the revision that those name which name one.

    Args:
        configs: by what to call the adapter.
        remedy: what to do where they do not agree.

    Raises:
        AdapterError: they name several bases or revisions, or one names none.
    """
    names = {config.base for config in configs.values()}
    revisions = {config.revision for config in configs.values() if config.revision}
    name = names.pop()
    if name is None or names or len(revisions) > 1:
        told = "; ".join(f"{called}: {config.named_base}" for called, config in configs.items())
        raise AdapterError(f"the adapters do not name one base ({told}); {remedy}")
    return name, revisions.pop() if revisions else None


def skeleton(name: str, revision: str | None = None) -> nn.Module:
    """A base model without memory for its weights: enough to tell what fits it.

    Raises:
        ConfigError: its config cannot be found, or no model can be made of it.
    """
    source = resolve_base(name)
    wanted = (None if Path(source).is_dir() else revision) or "main"
    try:
        data, _ = PreTrainedConfig.get_config_dict(source, revision=wanted)
        if (layers := _layers(data)) > _MOST_LAYERS:
            raise ValueError(f"it names {layers} layers, and {_MOST_LAYERS} are the most that are built")
        config = AutoConfig.from_pretrained(source, revision=wanted, trust_remote_code=False)
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            return model
    except Exception as error:  # a stranger's config may fail anywhere in transformers, in any way
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"base {name!r}: its config cannot be had, so adapters cannot be checked against it: {reason}\n"
            "Give a folder with a copy of it (--base FOLDER)"
        ) from None


def _layers(config: Mapping[str, Any]) -> int:
    """The most layers that a model's config or a part of it names."""
    named = [value for key, value in config.items() if "layer" in key and isinstance(value, int)]
    return max([*named, *(_layers(part) for part in config.values() if isinstance(part, dict))], default=0)


def names_of(base: str) -> set[str]:
    """What an adapter of a base may call it."""
    names = {base, resolve_base(base)}
    try:
        return {*names, base_identity(base).name}
    except ConfigError:
        return names


def check_adapter(folder: Path, base: nn.Module, base_names: Collection[str] = ()) -> None:
    """Check a PEFT folder against a base: kind, config, names, shapes and numbers.

    Args:
        base: may be a `skeleton`.
        base_names: see `read_lora`.

    Raises:
        AdapterError: it is no plain LoRA and no mixture of loramux, or does not fit the base.
    """
    config = read_adapter_config(folder / CONFIG)
    if config.kind != MIXTURE_KIND:
        read_lora(folder, base, base_names=base_names)
        return
    expected = _shapes_of_mixture(folder, config, base)
    found = _shapes_in(folder / WEIGHTS)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise AdapterError(
                f"{folder / WEIGHTS}: tensor {name[:160]!r} has shape {found.get(name, 'none')}; its config and this "
                f"base want {expected.get(name, 'none')}"
            )


def _shapes_of_mixture(folder: Path, config: AdapterConfig, base: Any) -> dict[str, tuple[int, ...]]:
    known = {field.name for field in fields(LoramuxConfig)}
    given = {key: value for key, value in config.data.items() if key in known and key != "peft_type"}
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            fresh = type(base)(base.config)
            model = get_peft_model(fresh, LoramuxConfig(**given))
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
    except LoramuxError as error:
        raise AdapterError(f"{folder}: {error}") from None
    except (ValueError, TypeError, RuntimeError) as error:
        raise AdapterError(f"{folder}: its config does not fit this base ({type(error).__name__}: {error})") from None
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with whole_safetensors(path), safe_open(path, "pt") as saved:
            return {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror})") from None
