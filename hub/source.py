"""What there is to publish: a run folder, a folder of exports, or one adapter, read into one form."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapters.lora_folder import CONFIG, WEIGHTS
from ..bases import BaseIdentity
from ..support.errors import ConfigError, RunError
from ..tasks import TaskConfig, load_tasks, read_task_configs
from ..training.assess import PREDICTIONS, RESULTS, ROUTING, read_results
from ..training.exports import EXPORTS
from ..training.recipe import Recipe, public_recipe
from ..training.report import COLUMNS, Results
from ..training.run_folder import RunFolder
from .checks import common_base, read_adapter_config

REPORT = "export.json"
MIXTURE = "mixture"
_PICTURES = ("scores.png", "losses.png", "routing.png")


@dataclass(frozen=True)
class Answered:
    """One example of a card: what was asked, what the adapter answered where that is known, and what was wanted."""

    prompt: str
    answer: str | None
    wanted: str


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One task's plain LoRA and what is known of it.

    Attributes:
        folder: a PEFT folder.
        scores: the main metric, 0..1, by column (the keys of `COLUMNS`).
        split: that scores and examples are of.
        report: how it was exported and what that lost; empty for an adapter that was made elsewhere.
        dataset: the Hub id of its data, where it has one, and `dataset_config` its configuration.
    """

    task: str
    folder: Path
    description: str = ""
    examples: tuple[Answered, ...] = ()
    metric: str = ""
    split: str = "test"
    scores: Mapping[str, float] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    dataset_config: str | None = None

    @property
    def files(self) -> dict[str, Path | str]:
        """What is published of it, by name: two files, and the export's report."""
        found: dict[str, Path | str] = {name: self.folder / name for name in (CONFIG, WEIGHTS)}
        if self.report:
            kept = {key: value for key, value in self.report.items() if key != "card"}
            found[REPORT] = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
        return found


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything that can be published together.

    Attributes:
        place: the folder that was named.
        base: as adapters name it.
        method: of the run; empty for adapters that were made elsewhere.
        mixture: the PEFT folder of all experts and their router, where there is one.
        results: the run's table, where it was evaluated.
        recipe: as YAML without paths of this machine.
        files: more files by name: figures and pictures.
        tasks: the run's task definitions, whose examples must not leak.
    """

    place: Path
    base: BaseIdentity
    adapters: tuple[Adapter, ...]
    method: str = ""
    mixture: Path | None = None
    results: Results | None = None
    recipe: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    tasks: tuple[TaskConfig, ...] = ()

    def only(self, task: str) -> "Source":
        """The part that is about one task."""
        return replace(self, adapters=tuple(a for a in self.adapters if a.task == task), mixture=None, files={})

    def private_texts(self) -> Iterator[str]:
        """Every prompt of the tasks' data.

        Raises:
            DataError, ConfigError: the data cannot be read.
        """
        for task in load_tasks(self.tasks):
            for examples in task.splits.values():
                yield from (example.prompt for example in examples)


def read_source(place: Path, *, examples: int) -> Source:
    """Read a run folder, a folder with an adapter folder per task, or one adapter folder.

    Args:
        examples: of each task, for its card.

    Raises:
        RunError: there is nothing finished to publish.
        ConfigError: the adapters are of a base that only this machine can find.
        AdapterError: they are of several, or what one says of itself cannot be read.
    """
    if (place / CONFIG).is_file():
        return _exports(place, [place], examples)
    if (place / "recipe.yaml").is_file():
        return _run(place, examples)
    folders = adapter_folders(place)
    if not folders:
        raise RunError(f"{place}: nothing to publish there: no run (recipe.yaml) and no adapters ({CONFIG})")
    return _exports(place, folders, examples)


def read_adapters(place: Path, *, examples: int) -> tuple[Adapter, ...]:
    """The adapters of a run folder, a folder of exports, or one adapter folder, whatever base they name."""
    if (place / CONFIG).is_file():
        return (_adapter(place, examples),)
    exports = place / EXPORTS if (place / "recipe.yaml").is_file() else place
    return tuple(_adapter(folder, examples) for folder in adapter_folders(exports))


def adapter_folders(place: Path) -> list[Path]:
    """The PEFT folders right below a folder."""
    return sorted(path.parent for path in place.glob(f"*/{CONFIG}") if not path.parent.name.startswith("."))


def _exports(place: Path, folders: list[Path], examples: int) -> Source:
    adapters = tuple(_adapter(folder, examples) for folder in folders)
    methods = {str(adapter.report["method"]) for adapter in adapters if adapter.report}
    recipes = {str(adapter.report.get("card", {}).get("recipe", "")) for adapter in adapters}
    return Source(
        place=place,
        base=_public_base(folders, place),
        adapters=adapters,
        method=methods.pop() if len(methods) == 1 else "",
        recipe=recipes.pop() if len(recipes) == 1 else "",
    )


def _run(place: Path, examples: int) -> Source:
    folder = RunFolder(place)
    mixture = folder.verify_mixture()
    recipe = folder.read_recipe()
    results = read_results(place) if (place / RESULTS).is_file() else None
    configs = {config.name: config for config in read_task_configs(recipe.tasks)} if recipe.tasks else {}
    order = {name: number for number, name in enumerate(configs)}
    exports = sorted(adapter_folders(place / EXPORTS), key=lambda folder: order.get(folder.name, len(order)))
    base = _public_base([*exports, mixture], place)
    shown = _answered(place, results, examples)
    adapters = tuple(
        _with_results(_adapter(export, examples), results, shown, configs.get(export.name)) for export in exports
    )
    return Source(
        place=place,
        base=base,
        adapters=adapters,
        method=recipe.method.name,
        mixture=mixture,
        results=results,
        recipe=public_recipe(recipe, base),
        environment=folder.environment(),
        files=_files(place, recipe),
        tasks=tuple(configs.values()),
    )


def _files(place: Path, recipe: Recipe) -> dict[str, Path]:
    figures = {name: place / name for name in (RESULTS, ROUTING, "metrics.jsonl", "environment.json", *_PICTURES)}
    figures |= {f"routing/{path.name}": path for path in sorted((place / "routing").glob("*.png"))}
    return {name: path for name, path in figures.items() if path.is_file()}


def _adapter(folder: Path, examples: int) -> Adapter:
    if not (folder / WEIGHTS).is_file():
        raise RunError(f"{folder}: no {WEIGHTS} in it; other formats, pickles above all, are not published")
    path = folder / REPORT
    report = _json(path, path.read_text(encoding="utf-8")) if path.is_file() else {}
    card = report.get("card", {})
    listed = card.get("examples", ())[:examples]
    return Adapter(
        task=report.get("task", folder.resolve().name),
        folder=folder,
        description=card.get("description", ""),
        examples=tuple(Answered(example["input"], None, example["target"]) for example in listed),
        split=card.get("split", "test"),
        report=report,
        **_scores_of_card(card.get("scores", {})),
    )


def _scores_of_card(scores: Mapping[str, float]) -> dict[str, Any]:
    """`{"task named (exact_match)": .9}` as the metric and a score by column."""
    columns = {name: column for column, name in COLUMNS.items()}
    found, metric = {}, ""
    for label, value in scores.items():
        name, _, rest = label.partition(" (")
        if name in columns:
            found[columns[name]], metric = value, rest.removesuffix(")")
    return {"metric": metric, "scores": found}


def _with_results(
    adapter: Adapter, results: Results | None, shown: Mapping[str, tuple[Answered, ...]], config: TaskConfig | None
) -> Adapter:
    if config is not None and config.source.dataset is not None and not Path(config.source.dataset).exists():
        adapter = replace(adapter, dataset=config.source.dataset, dataset_config=config.source.name)
    info = next((task for task in results.tasks if task.name == adapter.task), None) if results else None
    if results is None or info is None:
        return adapter
    values = {column: results.value(column, info) for column in results.columns}
    return replace(
        adapter,
        description=info.description or adapter.description,
        examples=shown.get(adapter.task, adapter.examples),
        metric=info.metric,
        split=results.run.get("split_per_task", {}).get(adapter.task, "test"),
        scores={column: value for column, value in values.items() if value is not None},
    )


def _answered(place: Path, results: Results | None, count: int) -> dict[str, tuple[Answered, ...]]:
    """The first answers of each task that were noted: those of the export where there is one, else of the method."""
    path = place / PREDICTIONS
    if results is None or not path.is_file():
        return {}
    found: dict[tuple[str, str], list[Answered]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = _json(path, line)
        listed = found.setdefault((row["task"], row["column"]), [])
        if len(listed) < count:
            listed.append(Answered(row["prompt"].strip(), row["prediction"], row["reference"]))
    columns = ("exported", results.main_column)
    return {
        task.name: tuple(next((found[task.name, c] for c in columns if (task.name, c) in found), ()))  # type: ignore[index]
        for task in results.tasks
    }


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(text)
        return data
    except ValueError as error:
        raise RunError(f"{path}: not readable as JSON ({error}); make it again") from None


def _public_base(folders: list[Path], place: Path) -> BaseIdentity:
    configs = {str(folder): read_adapter_config(folder / CONFIG) for folder in folders}
    name, revision = common_base(configs, "publish those of one base together, from a folder of their own")
    if name.startswith((".", "~")) or Path(name).is_absolute():
        raise ConfigError(
            f"{place}: its adapters name {name!r} as their base, which nobody else can find; say in the recipe which "
            "public model it is (base.known_as: owner/name), train again, or export it with --base-id owner/name and "
            "publish the exports"
        )
    return BaseIdentity(name, revision)
