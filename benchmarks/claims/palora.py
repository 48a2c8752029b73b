"""Does one model span the trade-off of two tasks? PaLoRA over preferences (Dimitriadis et al. 2024).

    python benchmarks/claims/palora.py --comparison comparisons/palora --to claims/palora

`who` and `where` get the same sentences and nothing says which is meant. Runs of PaLoRA on the mixture that ships,
which were trained with annealed preferences over all eight tasks, are asked at eleven preferences between these two;
beside them the LoRA of their size, which is one point.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import bed
from matplotlib.figure import Figure

from loramux.tasks import Task
from loramux.training.answers import Respondent
from loramux.training.comparison import Comparison
from loramux.training.evaluate import eval_mode, questions
from loramux.training.plots import colour
from loramux.training.run import TrainedRun, encode_all, load_run

TASKS, METHOD, EXAMPLES = ("who", "where"), "palora", 64
PREFERENCES = tuple(step / 10 for step in range(11))
Point = tuple[float, float]
"""The losses of the two tasks."""


def losses(run: TrainedRun, preference: Mapping[str, float] | None) -> Point:
    """Nats per answer token of both tasks on test examples."""
    asked = Respondent(run.model, run.tokenizer, {"routing_tasks": preference} if preference else {})
    chosen: list[Task] = [task for task in run.tasks if task.name in TASKS]
    found = []
    for task in encode_all(chosen, run.recipe, run.tokenizer, run.model):
        drawn = questions(task, "test", EXAMPLES)
        with eval_mode(run.model):
            scores = asked.option_scores([q.prompt for q in drawn], [[q.answer] for q in drawn])
        found.append(-sum(score for (score,) in scores) / sum(len(q.answer) for q in drawn))
    return found[0], found[1]


def sweep(folder: Path) -> list[Point]:
    """The losses at every preference for the first task."""
    run = load_run(folder)
    return [losses(run, dict(zip(TASKS, (share, 1 - share), strict=True))) for share in PREFERENCES]


def ordered(front: list[Point]) -> float:
    """The share of steps in which more preference for a task lowers its loss and raises the other's, in per cent."""
    right = [float(better) for (a, b), (c, d) in pairwise(front) for better in (c <= a, d >= b)]
    return 100 * bed.mean(right)


def main() -> None:
    parser = bed.parser(__doc__, "palora")
    parser.add_argument("--comparison", type=Path, default=Path("comparisons/palora"))
    args = parser.parse_args()
    entries = {entry.label: entry for entry in Comparison.load(args.comparison).chosen}
    entry = entries[METHOD]
    lora = entries[str(entry.contender.matched)]
    fronts, points = [], []
    for seed in args.seeds:
        fronts.append(bed.kept(args.to / f"{seed}.json", lambda seed=seed: sweep(args.comparison / entry.runs[seed])))
        lora_run = args.comparison / lora.runs[seed]
        points.append(bed.kept(args.to / f"lora-{seed}.json", lambda run=lora_run: losses(load_run(run), None)))
    rows = [
        [f"{share:g}", *(bed.over_seeds([front[place][task] for front in fronts], 2) for task in (0, 1))]
        for place, share in enumerate(PREFERENCES)
    ]
    rows.append([lora.label, *(bed.over_seeds([point[task] for point in points], 2) for task in (0, 1))])
    steps = [ordered(front) for front in fronts]
    title = f"Nats per answer token; {bed.over_seeds(steps)} % of all steps change the loss in the direction asked for"
    header = [f"preference for {TASKS[0]}", *(f"loss of {task}" for task in TASKS)]
    bed.show(args.to / "palora.json", title, header, rows, {"fronts": fronts, "lora": points, "ordered": steps})
    picture(fronts, points, args.to / "palora.png")


def picture(fronts: list[list[Point]], points: list[Point], path: Path) -> None:
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for number, front in enumerate(fronts):
        label = "PaLoRA, one line per seed" if number == 0 else None
        axes.plot(*zip(*front, strict=True), marker="o", markersize=4, color=colour("moa"), label=label)
    axes.scatter(*zip(*points, strict=True), color=colour("lora"), zorder=3, label="LoRA of its size")
    axes.set(xlabel=f"loss of {TASKS[0]}", ylabel=f"loss of {TASKS[1]}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
