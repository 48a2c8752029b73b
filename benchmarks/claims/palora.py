"""Does one model span the trade-offs of two tasks? PaLoRA over preferences (Dimitriadis et al. 2024).

    python benchmarks/claims/palora.py --to claims/palora

`who` and `where` get the same sentences and nothing says which is meant. PaLoRA is trained once, with preferences that
are annealed from even to extreme or drawn from the whole simplex, and asked at eleven preferences. Beside it LoRAs of
the same size, one for each share of the tasks' examples (linear scalarisation). The hypervolume is what a front of
losses dominates below two nats per answer token of either task.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import bed
from matplotlib.figure import Figure

from loramux.training.answers import Respondent
from loramux.training.evaluate import eval_mode, questions
from loramux.training.plots import colour
from loramux.training.recipe import Recipe
from loramux.training.run import TrainedRun, encode_all

TASKS, STEPS, REFERENCE = ("who", "where"), 400, 2.0
PREFERENCES = tuple(step / 10 for step in range(11))
SHARES = (0.2, 0.5, 0.8)
SCHEDULES = {"PaLoRA, annealed": True, "PaLoRA, whole simplex": False}
LORA = "LoRA r12, one per share"
Point = tuple[float, float]
"""The losses of the two tasks."""


def palora(annealed: bool) -> bed.Run:
    options = {"rank": 4, "shared_rank": 4, "annealed": annealed}
    return lambda rate, seed: bed.recipe("palora", options, bed.tasks(*TASKS), rate=rate, seed=seed, steps=STEPS)


def scalarised(share: float) -> bed.Run:
    weights = dict(zip(TASKS, (share, 1 - share), strict=True))

    def run(rate: float, seed: int) -> Recipe:
        return bed.recipe("lora", {"rank": 12}, bed.tasks(*TASKS), rate=rate, seed=seed, steps=STEPS, weights=weights)

    return run


def losses(run: TrainedRun, preference: Mapping[str, float] | None) -> Point:
    """Nats per answer token of both tasks on their test splits."""
    asked = Respondent(run.model, run.tokenizer, {"routing_tasks": preference} if preference else {})
    found = []
    for task in encode_all(run.tasks, run.recipe, run.tokenizer, run.model):
        drawn = questions(task, "test", None)
        with eval_mode(run.model):
            scores = asked.option_scores([q.prompt for q in drawn], [[q.answer] for q in drawn])
        found.append(-sum(score for (score,) in scores) / sum(len(q.answer) for q in drawn))
    return found[0], found[1]


def sweep(run: TrainedRun) -> list[Point]:
    """The losses at every preference for the first task."""
    return [losses(run, dict(zip(TASKS, (share, 1 - share), strict=True))) for share in PREFERENCES]


def ordered(front: list[Point]) -> float:
    """The share of steps in which more preference for a task lowers its loss and raises the other's, in per cent."""
    steps = list(pairwise(front))
    return 100 * bed.mean(float(right) for (a, b), (c, d) in steps for right in (c <= a, d >= b))


def hypervolume(front: list[Point]) -> float:
    """The area below the reference that some point of the front dominates."""
    area, lowest = 0.0, REFERENCE
    for first, second in sorted(front):
        if first < REFERENCE and second < lowest:
            area, lowest = area + (REFERENCE - first) * (lowest - second), second
    return area


def shared(front: list[Point]) -> list[Point]:
    """The points at the shares that LoRAs were trained with."""
    return front if len(front) == len(SHARES) else [front[PREFERENCES.index(share)] for share in SHARES]


def main() -> None:
    args = bed.parser(__doc__, "palora").parse_args()
    fronts: dict[str, list[list[Point]]] = {}
    rates: dict[str, float] = {}
    for name, annealed in SCHEDULES.items():
        folder, run = args.to / ("annealed" if annealed else "simplex"), palora(annealed)
        rates[name] = bed.tuned(run, folder)
        fronts[name] = [bed.measured(run, folder, rates[name], seed, sweep) for seed in args.seeds]
    rates[LORA] = bed.tuned(scalarised(0.5), args.to / "lora" / "0.5")
    fronts[LORA] = [[_of_share(args.to, share, rates[LORA], seed) for share in SHARES] for seed in args.seeds]
    rows = [_row(name, rates[name], found) for name, found in fronts.items()]
    header = [
        "",
        "models",
        "rate",
        "ordered steps, %",
        "hypervolume",
        "of three points",
        "loss preferred",
        "loss, even",
    ]
    bed.show(args.to / "palora.json", f"Losses of {' and '.join(TASKS)}, test split", header, rows, fronts)
    picture(fronts, args.to / "palora.png")


def _of_share(folder: Path, share: float, rate: float, seed: int) -> Point:
    run = scalarised(share)
    first, second = bed.measured(run, folder / "lora" / f"{share:g}", rate, seed, lambda found: losses(found, None))
    return first, second


def _row(name: str, rate: float, fronts: list[list[Point]]) -> list[str]:
    ends = [(front[-1][0] + front[0][1]) / 2 for front in fronts]
    even = [sum(front[len(front) // 2]) / 2 for front in fronts]
    volumes = [[hypervolume(points(front)) for front in fronts] for points in (list, shared)]
    figures = [bed.over_seeds([ordered(front) for front in fronts])] + [bed.over_seeds(found, 2) for found in volumes]
    models = str(len(SHARES)) if name == LORA else "1"
    return [name, models, f"{rate:g}", *figures, bed.over_seeds(ends, 2), bed.over_seeds(even, 2)]


def picture(fronts: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(fronts, (colour("moa"), colour("smora"), colour("lora")), strict=True))
    for name, found in fronts.items():
        for number, front in enumerate(found):
            label = name if number == 0 else None
            axes.plot(*zip(*front, strict=True), marker="o", markersize=4, color=colours[name], label=label)
    axes.set(
        xlabel=f"loss of {TASKS[0]}", ylabel=f"loss of {TASKS[1]}", xlim=(0, 2 * REFERENCE), ylim=(0, 2 * REFERENCE)
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
