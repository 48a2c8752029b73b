"""A few examples of an unseen task: MHR > Poly, MHR-mu close behind, MHR-z > Poly-z (Caccia et al. 2023).

    python benchmarks/claims/hubs.py --to claims/hubs
    python benchmarks/claims/few_shot.py --hubs claims/hubs --to claims/few_shot

Tasks that no hub has seen join hubs of one size with 16 examples each, by `loramux adapt`. With several `--rates`, that
of every way is chosen, hub by hub, on a further unseen task.
"""

import json
from pathlib import Path
from typing import Any

import bed
from hubs import HUBS, finished

from loramux.training.adapt import adapt_run
from loramux.training.adapt_ways import AdaptConfig

SHOTS, STEPS = 16, 50
TUNED_ON, UNSEEN = "thing", "smallest"
WAYS = {"lora": ("mean_expert",), "poly": ("row", "row_and_experts", "mean_expert")}
WAYS["mhr"] = WAYS["poly"]
RATES = "3e-3"
ROW = 50
"""Rows alone have this multiple of the rates of factors."""
Rates = dict[str, float]


def adapted(hub: Path, name: str, task: str, seed: int, rates: Rates, folder: Path) -> dict[str, dict[str, float]]:
    """By way, the metrics of a task that joined a hub; kept in `folder`."""
    path = folder / "adapt.json"
    if not path.is_file():
        settings = AdaptConfig(ways=WAYS[name], shots=SHOTS, steps=STEPS, learning_rates=rates, seed=seed)
        adapt_run(hub, bed.tasks(task), folder, settings)
    ways = json.loads(path.read_text())["ways"]
    return {one["way"]: {**one["scores"], "trained": one["trained_parameters"]} for one in ways}


def chosen_rates(hubs: Path, name: str, folder: Path, tried: list[float]) -> Rates:
    """For every way the rate with the lowest loss on the task kept for that, with seed 0."""
    rates = [{way: rate * ROW if way == "row" else rate for way in ("scratch", *WAYS[name])} for rate in tried]
    if len(rates) == 1:
        return rates[0]
    run = finished(name, hubs, 0)
    found = [adapted(run, name, TUNED_ON, 0, one, folder / TUNED_ON / name / f"{one['scratch']:g}") for one in rates]
    best = {way: min(range(len(rates)), key=lambda i: found[i][way]["loss"]) for way in rates[0]}
    return {way: rates[i][way] for way, i in best.items()}


def main() -> None:
    parser = bed.parser(__doc__, "few_shot")
    parser.add_argument("--hubs", type=Path, default=Path("claims/hubs"))
    parser.add_argument("--tasks", default=UNSEEN, help="of loramux.tasks.generated, none of them in the hubs")
    parser.add_argument("--rates", default=RATES, help="of all that trains factors, to choose from for every way")
    args = parser.parse_args()
    tried = [float(rate) for rate in args.rates.split(",")]
    tasks = args.tasks.split(",")
    data: dict[str, Any] = {}
    for name in HUBS:
        rates = chosen_rates(args.hubs, name, args.to, tried)
        found = {
            task: [
                adapted(finished(name, args.hubs, seed), name, task, seed, rates, args.to / task / name / f"{seed}")
                for seed in args.seeds
            ]
            for task in tasks
        }
        data[name] = {"rates": rates, "found": found}
    header = ["hub, way", "trained", "rate", *(f"{task}, {what}" for task in tasks for what in ("score", "loss"))]
    title = f"Exact match in % and loss in nats per answer token on the test split, {SHOTS} examples, {STEPS} steps"
    bed.show(args.to / "few_shot.json", title, header, [row for name in HUBS for row in _rows(name, data[name])], data)


def _rows(name: str, data: dict[str, Any]) -> list[list[str]]:
    ways = ("scratch", *WAYS[name]) if name == "lora" else WAYS[name]
    return [[f"{name}, {way}", *_cells(way, data)] for way in (*(["base"] if name == "lora" else []), *ways)]


def _cells(way: str, data: dict[str, Any]) -> list[str]:
    trained = next(iter(data["found"].values()))[0][way]["trained"]
    cells = [f"{int(trained):,}", f"{data['rates'].get(way, 0):g}"]
    for runs in data["found"].values():
        scores, losses = [100 * run[way]["exact_match"] for run in runs], [run[way]["loss"] for run in runs]
        cells += [bed.over_seeds(scores), bed.over_seeds(losses, 2)]
    return cells


if __name__ == "__main__":
    main()
