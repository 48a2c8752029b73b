"""Who routes prompts best? Prototypes without training, a trained classifier and Arrow, over the same experts.

    python benchmarks/claims/routers.py --to claims/routers

MoA trains an expert per task and a classifier of prompts (Feng et al. 2024). Its experts, exported and imported again,
get RouterRetriever's prototypes (Lee et al. 2024) and Arrow's (Ostapenko et al. 2024): nothing is trained for these. Of
five tasks each has inputs of its own kind; eight others are told apart by the first word of the prompt alone. Then the
last expert is left out and added again, to see what the prototypes of the others lose.
"""

from collections.abc import Sequence
from typing import Any, cast

import bed

from loramux.adapters import BaseIdentity, LoramuxModel, exact_factors, save_lora
from loramux.bases import BUNDLED
from loramux.training.evaluate import Scores
from loramux.training.imports import import_run
from loramux.training.recipe import MethodChoice, Recipe, TrainConfig
from loramux.training.run import TrainedRun, load_run

BEDS = {
    "inputs differ": bed.tasks("who", "sort", "plural", "opposite", "kind"),
    "first word differs": bed.tasks(*bed.SHIPPED, cue=True),
}
RATE, STEPS = 3e-3, 200
IMPORTED = {"prototypes": "router_retriever", "Arrow": "arrow"}
NAMED, CLASSIFIER = "task named (oracle)", "classifier (MoA)"
Figures = dict[str, Scores]


def moa(learnt: list[dict[str, Any]]) -> bed.Run:
    return lambda rate, seed: bed.recipe("moa", {"rank": 8}, learnt, rate=rate, seed=seed, steps=STEPS)


def measure(run: TrainedRun) -> Figures:
    """Scores by router: the oracle, MoA's own, and those that read prototypes off the experts or their prompts."""
    folder, names = run.folder.path, [task.name for task in run.tasks]
    for name in names:
        factors = exact_factors(cast(LoramuxModel, run.model.base_model), name)
        if not (folder / "experts" / name).is_dir():
            save_lora(folder / "experts" / name, factors, base=BaseIdentity(BUNDLED))
    found = {NAMED: bed.scores(run), CLASSIFIER: bed.scores(run, routing="auto")}
    for label, method in IMPORTED.items():
        found[label] = bed.scores(imported(run, method, names), routing="auto")
    found["prototypes, one left out"] = bed.scores(imported(run, "router_retriever", names[:-1]), routing="auto")
    return found


def imported(run: TrainedRun, method: str, names: Sequence[str]) -> TrainedRun:
    """The experts of these tasks under another router."""
    folder = run.folder.path
    target = folder / f"{method}-{len(names)}"
    if not target.is_dir():
        learnt = [task for task in cast(list[dict[str, Any]], run.recipe.tasks) if task["name"] in names]
        sources = {name: str((folder / "experts" / name).absolute()) for name in names}
        train = TrainConfig(start_from=sources, only_tasks=(), seed=run.recipe.train.seed)
        import_run(Recipe(tasks=learnt, method=MethodChoice(name=method), train=train), target)
    return load_run(target)


def main() -> None:
    args = bed.parser(__doc__, "routers").parse_args()
    rows, data = [], {}
    for title, learnt in BEDS.items():
        folder = args.to / title.replace(" ", "-")
        found = [bed.measured(moa(learnt), folder, RATE, seed, measure) for seed in args.seeds]
        rows += [_row(title, router, found) for router in found[0]]
        data[title] = found
    header = ["tasks", "router", "right expert, %", "mean score", "behind the oracle"]
    bed.show(args.to / "routers.json", "Routing and main metrics on the test split", header, rows, data)


def _row(title: str, router: str, found: list[Figures]) -> list[str]:
    means = [bed.mean_metric(one[router]) for one in found]
    oracle = [_mean_of(one[NAMED], list(one[router])) for one in found]
    gaps = [best - mean for best, mean in zip(oracle, means, strict=True)]
    right = [_right(one[router]) for one in found]
    cells = ["-" if right[0] is None else bed.over_seeds([value or 0 for value in right])]
    return [title, router, *cells, bed.over_seeds(means), "-" if router == NAMED else bed.over_seeds(gaps)]


def _mean_of(found: Scores, names: Sequence[str]) -> float:
    return bed.mean(value for task, value in bed.main_metrics(found).items() if task in names)


def _right(found: Scores) -> float | None:
    """How many prompts got their own task's expert, in per cent; None where tokens choose for themselves."""
    shares = [values["routing_accuracy"] for values in found.values() if "routing_accuracy" in values]
    return 100 * bed.mean(shares) if shares else None


if __name__ == "__main__":
    main()
