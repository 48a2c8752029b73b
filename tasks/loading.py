"""From a task file, a folder of data or Python objects to tasks."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..support.config import load_yaml, parse
from ..support.errors import ConfigError, did_you_mean
from .config import SourceConfig, TaskConfig
from .sources import split_files
from .task import Task

DEFAULT = Path(__file__).parent / "default.yaml"
TaskSource = str | Path | Sequence[Mapping[str, Any] | TaskConfig]


def load_tasks(source: TaskSource, *, only: Sequence[str] | None = None) -> list[Task]:
    """Read tasks with all their examples.

    Args:
        source: "default" (the mixture that ships); a YAML task file; a folder with train/validation/test files (one
            task) or with such folders in it (one task each); one data file; or task definitions as Python data.
        only: the tasks to keep, in this order.

    Raises:
        ConfigError: for wrong keys, names, templates and metrics, naming file, task and key.
        DataError: for unusable rows, naming file and line.
    """
    configs = read_task_configs(source)
    if only is not None:
        configs = _selected(configs, only)
    return [Task.from_config(config) for config in configs]


def read_task_configs(source: TaskSource) -> list[TaskConfig]:
    """The definitions of the tasks, without reading their examples; arguments and errors as `load_tasks`."""
    if not isinstance(source, str | Path):
        configs = [_config(item, f"task {i}", Path()) for i, item in enumerate(source, start=1)]
        return _distinct(configs, "the task list")
    path = DEFAULT if source == "default" else Path(source)
    if path.suffix.lower() in (".yaml", ".yml"):
        return _distinct(_from_yaml(path), str(path))
    if not path.exists():
        raise ConfigError(f"{path}: no such task file or folder (the mixture that ships is called 'default')")
    return _distinct(_from_data(path), str(path))


def _from_yaml(path: Path) -> list[TaskConfig]:
    document = load_yaml(path)
    document = {"tasks": document} if isinstance(document, list) else document
    if not isinstance(document, Mapping) or "tasks" not in document:
        raise ConfigError(f"{path}: a task file needs the key `tasks`, a list of tasks")
    for key in document:
        if key not in ("tasks", "defaults"):
            raise ConfigError(f"{path}: {key}: unknown key; {did_you_mean(str(key), ('tasks', 'defaults'))}")
    defaults, items = document.get("defaults") or {}, document["tasks"]
    if not isinstance(defaults, Mapping):
        raise ConfigError(f"{path}: defaults: must be a mapping of task keys")
    if not isinstance(items, list) or not items:
        raise ConfigError(f"{path}: tasks: must be a list with at least one task")
    return [_config(item, f"{path}: task {i}", path.parent, defaults) for i, item in enumerate(items, start=1)]


def _config(item: Any, where: str, folder: Path, defaults: Mapping[str, Any] | None = None) -> TaskConfig:
    if isinstance(item, TaskConfig):
        config = item
    elif isinstance(item, Mapping):
        name = f" ({item['name']!r})" if "name" in item else ""
        config = parse(TaskConfig, {**(defaults or {}), **item}, where=where + name)
    else:
        raise ConfigError(f"{where}: must be a mapping with name and source, not {str(item)[:60]!r}")
    source = config.source
    if source.path is not None:
        # Absolute, so that a run folder which records it can be read from anywhere.
        source = dataclasses.replace(source, path=str((folder / Path(source.path).expanduser()).resolve()))
    return dataclasses.replace(config, source=source)


def _from_data(path: Path) -> list[TaskConfig]:
    folders = [path]
    if path.is_dir() and "train" not in split_files(path, SourceConfig()):
        children = sorted(child for child in path.iterdir() if child.is_dir())
        folders = [child for child in children if "train" in split_files(child, SourceConfig())]
    if not folders:
        raise ConfigError(f"{path}: no train.jsonl (or .json, .csv, .tsv, .parquet) in it or in its folders")
    return [_config({"name": folder.stem, "source": {"path": str(folder)}}, str(folder), Path()) for folder in folders]


def _distinct(configs: list[TaskConfig], where: str) -> list[TaskConfig]:
    # Compared without case: on some file systems "Who" and "who" would be one export folder.
    seen: set[str] = set()
    for config in configs:
        if config.name.lower() in seen:
            raise ConfigError(f"{where}: two tasks are called {config.name!r} (case does not count)")
        seen.add(config.name.lower())
    return configs


def _selected(configs: list[TaskConfig], only: Sequence[str]) -> list[TaskConfig]:
    by_name = {config.name: config for config in configs}
    for name in only:
        if name not in by_name:
            raise ConfigError(f"no task {name!r}; {did_you_mean(name, by_name)}")
    return [by_name[name] for name in only]
