"""A few examples of an unseen task: MHR > Poly, MHR-mu close behind, MHR-z > Poly-z (Caccia et al. 2023).

    python benchmarks/claims/hubs.py --to claims/hubs
    python benchmarks/claims/few_shot.py --hubs claims/hubs --to claims/few_shot

Tasks that no hub has seen join hubs of one size with 16 examples each, by `loramux adapt`. With several `--rates`, that
of every way is chosen, hub by hub, on a further unseen task. `--hubs` may be a comparison, and `--tasks` a task file.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bed
from hubs import HUBS, finished

from loramux.tasks import TaskConfig, read_task_configs
from loramux.training.adapt import adapt_run
from loramux.training.adapt_ways import AdaptConfig
from loramux.training.comparison import COMPARISON, Comparison

TUNED_ON, UNSEEN = "thing", "smallest"
WAYS = {"lora": ("mean_expert",), "poly": ("row", "row_and_experts", "mean_expert")}
WAYS["mhr"] = WAYS["poly"]
RATES = "3e-3"
ROW = 50
"""Rows alone have this multiple of the rates of factors."""
Rates = dict[str, float]
FindHub = Callable[[str, int], Path]
"""The run of a hub, by its name and seed."""


def hubs_in(folder: Path) -> FindHub:
    """The hubs that `hubs.py` leaves in a folder, or those of a comparison, at the rate that is best for each."""
    if not (folder / COMPARISON).is_file():
        return lambda name, seed: finished(name, folder, seed)
    runs: dict[str, dict[int, str]] = {}
    for entry in Comparison.load(folder).chosen:
        runs.setdefault(entry.contender.method, entry.runs)
    return lambda name, seed: folder / runs[name][seed]


def unseen_tasks(named: str) -> list[TaskConfig]:
    """Of a task file, or generated ones by their names."""
    return read_task_configs(named if named.endswith(".yaml") else bed.tasks(*named.split(",")))


def adapted(hub: Path, task: TaskConfig, settings: AdaptConfig, folder: Path) -> dict[str, dict[str, float]]:
    """By way, the figures of a task that joined a hub; kept in `folder`."""
    path = folder / "adapt.json"
    if not path.is_file():
        adapt_run(hub, [task], folder, settings)
    found = json.loads(path.read_text())
    return {
        one["way"]: {
            "score": one["scores"][found["facts"]["metric"]],
            "loss": one["scores"]["loss"],
            "trained": one["trained_parameters"],
        }
        for one in found["ways"]
    }


def chosen_rates(hub: Path, tried: list[float], settings: AdaptConfig, folder: Path) -> Rates:
    """For every way the rate with the lowest loss on the task kept for that."""
    ways = ("scratch", *(settings.ways or ()))
    rates = [{way: rate * ROW if way == "row" else rate for way in ways} for rate in tried]
    if len(rates) == 1:
        return rates[0]
    (task,) = unseen_tasks(TUNED_ON)
    found = [adapted(hub, task, replace(settings, learning_rates=one), folder / f"{one['scratch']:g}") for one in rates]
    best = {way: min(range(len(rates)), key=lambda i: found[i][way]["loss"]) for way in ways}
    return {way: rates[i][way] for way, i in best.items()}


def study(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One hub's rates and, by task and seed, its figures."""
    find, settings = hubs_in(args.hubs), AdaptConfig(ways=WAYS[name], shots=args.shots, steps=args.steps)
    tried = [float(rate) for rate in args.rates.split(",")]
    rates = chosen_rates(find(name, 0), tried, settings, args.to / TUNED_ON / name)
    found = {
        task.name: [
            adapted(
                find(name, seed),
                task,
                replace(settings, learning_rates=rates, seed=seed),
                args.to / task.name / name / f"{seed}",
            )
            for seed in args.seeds
        ]
        for task in unseen_tasks(args.tasks)
    }
    return {"rates": rates, "found": found}


def main() -> None:
    parser = bed.parser(__doc__, "few_shot")
    parser.add_argument("--hubs", type=Path, default=Path("claims/hubs"))
    parser.add_argument("--tasks", default=UNSEEN, help="of loramux.tasks.generated, or a task file; none in the hubs")
    parser.add_argument("--rates", default=RATES, help="of all that trains factors, to choose from for every way")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    data = {name: study(name, args) for name in HUBS}
    tasks = data["lora"]["found"]
    header = ["hub, way", "trained", "rate", *(f"{task}, {what}" for task in tasks for what in ("score", "loss"))]
    title = (
        "Main metric in % and loss in nats per answer token on the test split, "
        f"{args.shots} examples, {args.steps} steps"
    )
    bed.show(args.to / "few_shot.json", title, header, [row for name in HUBS for row in _rows(name, data[name])], data)


def _rows(name: str, data: dict[str, Any]) -> list[list[str]]:
    ways = ("scratch", *WAYS[name]) if name == "lora" else WAYS[name]
    return [[f"{name}, {way}", *_cells(way, data)] for way in (*(["base"] if name == "lora" else []), *ways)]


def _cells(way: str, data: dict[str, Any]) -> list[str]:
    trained = next(iter(data["found"].values()))[0][way]["trained"]
    cells = [f"{int(trained):,}", f"{data['rates'].get(way, 0):g}"]
    for runs in data["found"].values():
        scores, losses = [100 * run[way]["score"] for run in runs], [run[way]["loss"] for run in runs]
        cells += [bed.over_seeds(scores), bed.over_seeds(losses, 2)]
    return cells


if __name__ == "__main__":
    main()
