"""Do routers of tokens collapse without balancing? Effective experts over the steps of training.

    python benchmarks/claims/collapse.py --to claims/collapse

MoLoRA with its balance loss and without (Zadouri et al. 2023), SMoRA with the selection bias at the paper's rate, at a
hundred times that, and without (Zhao et al. 2025). Effective experts are `(sum u)^2 / sum u^2` of the usage `u`, the
mean over routers, as every run logs them.
"""

from pathlib import Path
from typing import Any

import bed
from matplotlib.figure import Figure

from loramux.training.evaluate import Scores
from loramux.training.run import TrainedRun

TASKS = ("where", "tomorrow", "sort", "plural")
STEPS = 200
MOLORA = {"experts": 8, "rank": 8}
SMORA = {"rank": 64, "top_k": 8}
CONTENDERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "MoLoRA, balance loss 0.01": ("molora", MOLORA, 8),
    "MoLoRA, none": ("molora", {**MOLORA, "balance_loss": 0.0}, 8),
    "SMoRA, bias rate 1e-5": ("smora", SMORA, 64),
    "SMoRA, bias rate 1e-3": ("smora", {**SMORA, "balance_rate": 1e-3}, 64),
    "SMoRA, none": ("smora", {**SMORA, "balance_rate": 0.0}, 64),
}
"""By label the method, its options and how many experts it has."""
RATE = 3e-3
EFFECTIVE = "routing/effective_experts"


def run_of(label: str) -> bed.Run:
    method, options, _ = CONTENDERS[label]
    return lambda rate, seed: bed.recipe(
        method, options, bed.tasks(*TASKS, cue=True), rate=rate, seed=seed, steps=STEPS
    )


def measure(run: TrainedRun) -> dict[str, Any]:
    logged = {line["step"]: line[EFFECTIVE] for line in run.folder.metrics() if EFFECTIVE in line}
    fewest = [line["routing/fewest_experts"] for line in run.folder.metrics() if EFFECTIVE in line]
    return {"effective": logged, "fewest": fewest[-1], "scores": bed.scores(run)}


def main() -> None:
    args = bed.parser(__doc__, "collapse").parse_args()
    rows, data = [], {}
    for label, (_, _, experts) in CONTENDERS.items():
        folder = args.to / label.replace(" ", "-").replace(",", "")
        found = [bed.measured(run_of(label), folder, RATE, seed, measure) for seed in args.seeds]
        curves = [list(one["effective"].values()) for one in found]
        scores: list[Scores] = [one["scores"] for one in found]
        moments = [[curve[0] for curve in curves], [curve[len(curve) // 2] for curve in curves]]
        moments += [[curve[-1] for curve in curves], [one["fewest"] for one in found]]
        means = bed.over_seeds([bed.mean_metric(one) for one in scores])
        rows.append([label, str(experts), *(bed.over_seeds(values) for values in moments), means])
        data[label] = {"experts": experts, "runs": found}
    header = ["", "experts", "at the start", "half-way", "at the end", "least layer, end", "mean score"]
    bed.show(args.to / "collapse.json", f"Effective experts over {STEPS} steps, rate {RATE:g}", header, rows, data)
    picture(data, args.to / "collapse.png")


def picture(data: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, entry in data.items():
        curves = [run["effective"] for run in entry["runs"]]
        steps = [int(step) for step in curves[0]]
        shares = [100 * bed.mean(curve[step] for curve in curves) / entry["experts"] for step in curves[0]]
        axes.plot(steps, shares, label=label, linestyle="--" if "none" in label else "-")
    axes.set(xlabel="step", ylabel="effective experts, % of all", ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
