"""Configuration as data: frozen dataclasses, validated once, filled from YAML, `--set` or Python alike."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform, get_args

import pydantic
import yaml
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import Field

from .errors import ConfigError, did_you_mean

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, Field))
def config(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass that checks types on construction and refuses unknown keys."""
    return pydantic_dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})(cls)  # type: ignore[return-value]


def parse(cls: type[T], data: Mapping[str, Any], *, where: str) -> T:
    """Build `cls` from plain data.

    Args:
        where: what the data came from (a file name, "--set"), the first word of every message.

    Raises:
        ConfigError: naming every fault at once, each with its dotted key; unknown keys with the nearest valid one.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_python(dict(data))
    except pydantic.ValidationError as error:
        faults = [_describe(cls, fault) for fault in error.errors()]
        raise ConfigError("\n".join(f"{where}: {fault}" for fault in dict.fromkeys(faults))) from None


def to_data(value: Any) -> Any:
    """The plain (JSON and YAML safe) form of a config, the inverse of `parse`."""
    return pydantic.TypeAdapter(type(value)).dump_python(value, mode="json")


def load_yaml(path: str | Path) -> Any:
    """Read one YAML document safely; errors name the file and the line."""
    path = Path(path)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a UTF-8 text file") from None
    except (OSError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: {getattr(error, 'problem', None) or error}") from None


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `data` with every `dotted.key=value` applied; values are read as YAML.

    Raises:
        ConfigError: when an override has no `=`, or steps into something that is not a mapping.
    """
    result = _copy(data)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(f"--set {override!r}: write it as key=value, for example train.steps=200")
        *parents, last = dotted.strip().split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--set {override!r}: {parent!r} has no keys of its own")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: {error}") from None
    return result


def _copy(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _copy(value) for key, value in node.items()}
    return list(node) if isinstance(node, list) else node


def _describe(cls: type, fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        *parents, wrong = fault["loc"]
        return f"{key}: unknown key; {did_you_mean(str(wrong), _field_names(cls, parents))}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("missing", "missing_argument"):
        message = "this key is required"
    shown = f" (got {fault['input']!r})" if isinstance(fault.get("input"), str | int | float | bool) else ""
    return f"{key}: {message}{shown}" if key else f"{message}"


def _field_names(cls: Any, path: list[Any]) -> list[str]:
    """The valid keys of the dataclass that `path` leads to."""
    for step in path:
        fields = {f.name: f.type for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        cls = _dataclass_in(fields.get(step, cls))
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _dataclass_in(annotation: Any) -> Any:
    """The first dataclass inside an annotation such as `tuple[X, ...] | None`."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _dataclass_in(arg)) is not None), None)
