"""What the routers of a finished run do: one table, pictures, a page of coloured text, and all of it as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import jensenshannon

from ..adapters import LoramuxModel
from ..routing import Granularity, RoutingStatistics
from ..support.errors import ConfigError, did_you_mean
from ..support.files import write_json
from ..tasks import EncodedTask
from .assess import encode_tasks
from .evaluate import Routing, hub_of
from .plots import place_of, plot_usage
from .route_plots import plot_cosines, plot_over_time, plot_similarity
from .run import TrainedRun
from .token_page import trace_texts, write_page
from .usage import expert_names, routing_usage, usage_data

DATA, PAGE, OVER_TIME, SIMILARITY, COSINES = (
    "routes.json",
    "tokens.html",
    "over_time.png",
    "similarity.png",
    "gradients.png",
)
_MOST_ROWS = 24


@dataclass(frozen=True)
class RouteReport:
    """What was found and written.

    Attributes:
        rows: of the table: where, effective experts of how many, entropy, the tasks routed most differently.
        written: files, the overview first.
        remarks: what is missing and why, a sentence each.
    """

    rows: list[list[str]]
    written: list[Path]
    remarks: list[str]


HEADER = ["router", "effective experts", "entropy, nats", "most distinct tasks (distance)"]


def report_routes(run: TrainedRun, to: Path, *, only: Sequence[str] | None = None, examples: int = 4) -> RouteReport:
    """Run the examples of a run's tasks through its routers and write what they did into `to`.

    Args:
        only: the tasks to look at; None: all.
        examples: per task on the page of coloured text.

    Raises:
        ConfigError: the run has no such task, or its method has no router that could choose.
        RunError: it was imported without tasks.
    """
    hub = hub_of(run.model)
    assert hub is not None
    _check_routed(run, hub)
    tasks = _chosen(encode_tasks(run), only)
    config = run.recipe.evaluate
    usage = routing_usage(
        run.model, run.tokenizer, tasks, split=config.split, limit=config.limit, batch_size=config.batch_size
    )
    assert usage is not None
    distances = {name: task_distances(layer.usage().double().numpy()) for name, layer in usage.layers.items()}
    missing = untracked(hub, usage)
    data = {**usage_data(hub, usage), "method": run.recipe.method.name, "split": config.split}
    data |= {"untracked": missing, "distances": {name: _plain(found) for name, found in distances.items()}}
    write_json(to / DATA, data)
    written, remarks = _draw(run, to, data, distances)
    page, why_not = _write_page(run, hub, to, tasks, examples)
    remarks += [*why_not, *_told(missing)]
    return RouteReport(_rows(usage, distances), [*written, *page, to / DATA], remarks)


def task_distances(usage: np.ndarray) -> np.ndarray:
    """Jensen-Shannon distances between tasks' usage of experts: 0 where it is the same, 1 where none is shared.

    Args:
        usage: `(tasks, gates)`, rows that sum to one.

    Returns:
        `(tasks, tasks)`; NaN for tasks that were not seen, or had every gate shut.
    """
    distances = np.nan_to_num(jensenshannon(usage[:, None], usage[None], base=2, axis=-1))  # rounding can give NaN
    idle = usage.sum(1) == 0
    distances[idle] = np.nan
    distances[:, idle] = np.nan
    return distances


def untracked(hub: LoramuxModel, usage: RoutingStatistics) -> dict[str, str]:
    """The adapted layers and routers that usage says nothing of, and why."""
    missing = {}
    for name, router in hub.named_routers().items():
        if router.granularity == Granularity.FIXED:
            missing[name] = "weights its experts without looking at task or text"
        elif name not in usage.layers:
            missing[name] = "decided nothing on these examples"
    for name, layer in hub.layers().items():
        if all(branch.config.router is None for branch in layer.branches(hub.active_adapters[0])):
            missing[name] = "has no router: all is always on"
    return missing


def _check_routed(run: TrainedRun, hub: LoramuxModel) -> None:
    if hub.granularity > Granularity.FIXED:
        return
    reason = "chooses among its experts by chance alone" if hub.named_routers() else "has no router: all is always on"
    raise ConfigError(
        f"{run.folder.path}: method {run.recipe.method.name!r} {reason}, so there are no routes to show; `loramux "
        "methods` lists what routes by task, sequence or token"
    )


def _chosen(tasks: list[EncodedTask], only: Sequence[str] | None) -> list[EncodedTask]:
    names = [task.name for task in tasks]
    for name in only or ():
        if name not in names:
            raise ConfigError(f"this run has no task {name!r}; {did_you_mean(name, names)}")
    return [task for task in tasks if only is None or task.name in only]


def _draw(
    run: TrainedRun, to: Path, data: Mapping[str, Any], distances: Mapping[str, np.ndarray]
) -> tuple[list[Path], list[str]]:
    """The pictures there is something to draw for, and why others are missing."""
    title, remarks = run.recipe.method.name, []
    written = plot_usage(data, to, title=title)
    if over_time := [line for line in run.folder.metrics() if "routing/effective_experts" in line]:
        plot_over_time(over_time, to / OVER_TIME, title=title)
        written.append(to / OVER_TIME)
    else:
        remarks.append(f"No {OVER_TIME}: the log of this run has no figures of routing.")
    mean = np.mean(list(distances.values()), axis=0)
    if len(mean) > 1 and not np.isnan(mean).any():
        plot_similarity(mean, data["tasks"], to / SIMILARITY, title=title)
        written.append(to / SIMILARITY)
    else:
        remarks.append(f"No {SIMILARITY}: it takes two tasks or more, each of which uses an expert everywhere.")
    if gradients := run.folder.gradients():
        plot_cosines(gradients, to / COSINES, title=title)
        written.append(to / COSINES)
    else:
        remarks.append(f"No {COSINES}: gradients are logged where the recipe says so (train.log_gradients: 50).")
    return written, remarks


def _write_page(
    run: TrainedRun, hub: LoramuxModel, to: Path, tasks: Sequence[EncodedTask], examples: int
) -> tuple[list[Path], list[str]]:
    routers = hub.named_routers()
    gates = {name: router.gates for name, router in routers.items() if router.granularity == Granularity.TOKEN}
    if not gates:
        once = "prompt" if hub.granularity == Granularity.SEQUENCE else "task"
        return [], [f"No {PAGE}: {run.recipe.method.name} decides once per {once}, not token by token."]
    routing: Routing = "named" if hub.needs_task else "auto"
    texts = trace_texts(
        run.model,
        hub,
        run.tokenizer,
        tasks,
        list(gates),
        split=run.recipe.evaluate.split,
        count=examples,
        routing=routing,
    )
    title = f"{run.recipe.method.name}: which expert each token goes to"
    write_page(to / PAGE, texts, gates, expert_names(hub), title=title)
    return [to / PAGE], []


def _rows(usage: RoutingStatistics, distances: Mapping[str, np.ndarray]) -> list[list[str]]:
    """One row per router; one per decoder layer where they are many."""
    blocks: dict[str, list[str]] = {}
    for name in usage.layers:
        block = place_of(name)[0] if len(usage.layers) > _MOST_ROWS else name
        blocks.setdefault(block, []).append(name)
    return [_row(block, names, usage, distances) for block, names in blocks.items()]


def _row(block: str, names: Sequence[str], usage: RoutingStatistics, distances: Mapping[str, np.ndarray]) -> list[str]:
    layers = [usage.layers[name] for name in names]
    gates = sorted({layer.weights.shape[-1] // layer.groups for layer in layers})
    effective = np.mean([layer.effective_experts() for layer in layers])
    entropy = np.mean([layer.mean_entropy() for layer in layers])
    where = block if len(names) == 1 else f"{block}, mean of {len(names)}"
    of = "-".join(str(count) for count in dict.fromkeys((gates[0], gates[-1])))
    return [where, f"{effective:.2f} of {of}", f"{entropy:.2f}", _most_distinct(names, usage.tasks, distances)]


def _most_distinct(names: Sequence[str], tasks: Sequence[str], distances: Mapping[str, np.ndarray]) -> str:
    mean = np.mean([distances[name] for name in names], axis=0)
    if len(tasks) < 2 or np.isnan(mean).all():
        return "-"
    one, other = divmod(int(np.nanargmax(mean)), len(tasks))
    return f"{tasks[one]}, {tasks[other]} ({mean[one, other]:.2f})"


def _plain(distances: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(value) else round(value, 6) for value in row] for row in distances.tolist()]


def _told(missing: Mapping[str, str]) -> list[str]:
    """What is not tracked, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    return [f"Not in the table, {reason}: {', '.join(names)}." for reason, names in reasons.items()]
