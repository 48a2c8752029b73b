"""What a hub says about a repo: read from its card and its adapter's config, neither of which is trusted."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)\r?\n?^---[ \t]*$", re.DOTALL | re.MULTILINE)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # text with one cannot be sent: it has no UTF-8
_MAX_BITS = 64  # of a number that the database and all readers take
_MAX_BYTES, _MAX_DEPTH, _MAX_TAGS, _MAX_TAG = 256 * 1024, 30, 300, 300


class CardError(ValueError):
    """The metadata of a card cannot be read."""


def split_card(text: str) -> tuple[str, str]:
    """The YAML metadata of a README.md, without its fences, and the text below it."""
    match = _FRONT_MATTER.match(text)
    return (match[1], text[match.end() :].lstrip("\r\n")) if match else ("", text)


def card_metadata(text: str) -> dict[str, Any]:
    """The metadata of a README.md as plain JSON data.

    Raises:
        CardError: it is no YAML mapping, or larger, deeper or more entangled than any honest card.
    """
    front, _ = split_card(text)
    if len(front.encode()) > _MAX_BYTES:
        raise CardError(f"the metadata is larger than {_MAX_BYTES} bytes")
    try:
        _refuse_bombs(front)
        data = _plain(yaml.load(front, Loader=_LOADER))
    except (yaml.YAMLError, ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        raise CardError(str(error)) from None
    if not isinstance(data, dict | None):
        raise CardError(f"the metadata is not a mapping of names to values but a {type(data).__name__}")
    return data or {}


def _refuse_bombs(front: str) -> None:
    """Aliases let a few lines stand for gigabytes, and nesting exhausts the stack of whoever reads it."""
    depth = 0
    for event in yaml.parse(front, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise CardError("the metadata uses YAML aliases (*name), which cards do not need")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise CardError(f"the metadata is nested deeper than {_MAX_DEPTH} levels")


def _plain(value: Any) -> Any:
    """The value as JSON that every reader takes; None for what has no such form."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if _plain(str(key)) is not None}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if value.bit_length() < _MAX_BITS else None
    return None if value is None or _LONE_SURROGATE.search(text := str(value)) else text


def read_json(data: bytes) -> Any:
    """JSON of a file that somebody uploaded, plain as a card's metadata; None where it is none."""
    try:
        return _plain(json.loads(data))
    except (ValueError, RecursionError):
        return None


def describe(paths: Iterable[str], card: Mapping[str, Any], adapter_config: Any) -> tuple[list[str], dict[str, Any]]:
    """The tags by which a repo is found, and the facts its listing shows.

    Args:
        adapter_config: of the adapter in the repo, or of the first of several; None where there is none. It says what
            the card should have said: `PeftModel.push_to_hub` leaves a card without the base and without `peft`.
    """
    paths = list(paths)
    config = adapter_config if isinstance(adapter_config, dict) else {}
    is_adapter = adapter_config is not None
    library = "peft" if is_adapter else card.get("library_name") or ("transformers" if "config.json" in paths else None)
    base_models = _texts(card.get("base_model")) or _texts(config.get("base_model_name_or_path"))
    tags = [
        *_texts(library),
        *(["safetensors"] if any(path.endswith(".safetensors") for path in paths) else []),
        *_texts(card.get("tags")),
        *(f"task:{result['task']}" for result in results(card)),
        *_texts(card.get("pipeline_tag")),
        *_texts(card.get("language")),
        *(f"dataset:{name}" for name in _texts(card.get("datasets"))),
        *(f"license:{name}" for name in _texts(card.get("license"))),
    ]
    relation = card.get("base_model_relation") or ("adapter" if is_adapter else None)
    for base in base_models:
        tags.append(f"base_model:{base}")
        if isinstance(relation, str):
            tags.append(f"base_model:{relation}:{base}")
    facts = {
        "library_name": library if isinstance(library, str) else None,
        "pipeline_tag": card.get("pipeline_tag") if isinstance(card.get("pipeline_tag"), str) else None,
    }
    if is_adapter:
        wanted = ("base_model_name_or_path", "task_type", "peft_type", "r")
        facts["config"] = {"peft": {key: config[key] for key in wanted if isinstance(config.get(key), str | int)}}
    short = (tag for tag in tags if 0 < len(tag) <= _MAX_TAG)
    return list(dict.fromkeys(short))[:_MAX_TAGS], facts


def results(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of a card's `model-index`: `task`, `metric` and `value`, where the three are there."""
    found = []
    for model in _mappings(card.get("model-index")):
        for result in _mappings(model.get("results")):
            task, dataset = (part if isinstance(part := result.get(key), dict) else {} for key in ("task", "dataset"))
            for metric in _mappings(result.get("metrics")):
                value, name = metric.get("value"), metric.get("name") or metric.get("type")
                label = task.get("name") or dataset.get("name") or task.get("type")
                if isinstance(value, int | float) and isinstance(name, str) and isinstance(label, str):
                    found.append({"task": label, "metric": name, "value": value})
    return found[:200]


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
