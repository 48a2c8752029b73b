"""Hubs of one size on the mixture that ships: what the claims about Poly and MHR start from.

    python benchmarks/claims/hubs.py --to claims/hubs

While they train, every 20 steps the gradient of each task on all that tasks share is taken; the table has the cosines,
averaged over pairs of tasks and over the run: MHR > Poly > LoRA (Caccia et al. 2023).
"""

from pathlib import Path
from typing import Any

import bed

from loramux.training.recipe import Recipe
from loramux.training.run_folder import RunFolder

_SIZE = {"skills": 8, "rank": 8, "alpha": 8.0, "sampled": False}
HUBS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 64}),
    "poly": ("poly", _SIZE),
    "mhr": ("mhr", {**_SIZE, "splits": 8}),
}
"""Poly is MHR with one split; both as in the runs of Caccia et al., with even scaling and without sampling."""
LOGGED = 20
SCORES = 10
"""How much faster than the skills the tasks' scores learn."""
COSINE = "gradients/cosine"


def recipe_of(hub: str) -> bed.Run:
    method, options = HUBS[hub]

    def run(rate: float, seed: int) -> Recipe:
        learnt = bed.tasks(*bed.SHIPPED)
        train = {"log_gradients": LOGGED, "task_logit_learning_rate": SCORES * rate}
        return bed.recipe(method, options, learnt, rate=rate, seed=seed, **train)

    return run


def finished(name: str, folder: Path, seed: int) -> Path:
    """The folder of a finished hub at the rate that is best for it."""
    rate = bed.tuned(recipe_of(name), folder / name)
    bed.measured(recipe_of(name), folder / name, rate, seed)
    return folder / name / f"lr-{rate:g}-seed-{seed}"


def cosines(run: Path) -> dict[int, float]:
    """By step, the cosine between the gradients of two tasks, averaged over all pairs."""
    return {line["step"]: line[COSINE] for line in RunFolder(run).metrics() if COSINE in line}


def main() -> None:
    args = bed.parser(__doc__, "hubs").parse_args()
    rows, data = [], {}
    for name in HUBS:
        runs = [finished(name, args.to, seed) for seed in args.seeds]
        rate = bed.tuned(recipe_of(name), args.to / name)
        scores = [bed.mean_metric(bed.measured(recipe_of(name), args.to / name, rate, seed)) for seed in args.seeds]
        by_step = [cosines(run) for run in runs]
        whole = [bed.mean(found.values()) for found in by_step]
        late = [bed.mean(list(found.values())[len(found) // 2 :]) for found in by_step]
        rows.append([name, f"{rate:g}", bed.over_seeds(scores), bed.over_seeds(whole, 3), bed.over_seeds(late, 3)])
        data[name] = {"rate": rate, "scores": scores, "cosines": by_step}
    header = ["hub", "rate", "mean score", "cosine, whole run", "cosine, second half"]
    bed.show(args.to / "hubs.json", "Cosine between the gradients of two tasks", header, rows, data)


if __name__ == "__main__":
    main()
