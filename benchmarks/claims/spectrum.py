"""How flat is what MultiLoRA learns? Singular values of its updates against LoRA's at equal rank (Wang et al. 2023).

    python benchmarks/claims/spectrum.py --comparison comparisons/default --to claims/spectrum

Reads the runs of the first comparison of docs/results.md: MultiLoRA, 3 x 21 ranks, and the LoRA of its size, r64, each
at the learning rate that is best for it, and where seed 0 tried other rates, those too. Shares and effective ranks (the
exponential of the entropy of the singular values' shares) are means over all adapted linears.
"""

from pathlib import Path
from typing import Any, cast

import bed
import torch
from matplotlib.figure import Figure
from torch import Tensor

from loramux.adapters import LoramuxModel, exact_factors
from loramux.training.comparison import Chosen, Comparison
from loramux.training.plots import colour
from loramux.training.run import load_run

METHODS = ("lora", "multilora")


def spectra(run: Path) -> Tensor:
    """`(linears, rank)`: the singular values of every update as shares of their sum, the largest first."""
    hub = cast(LoramuxModel, load_run(run).model.base_model)
    updates = [pair.delta().detach().double() for pair in exact_factors(hub, None).values()]
    rank = min(min(update.shape) for update in updates)
    values = torch.stack([torch.linalg.svdvals(update)[:rank] for update in updates])
    return values / values.sum(-1, keepdim=True)


def figures(run: Path) -> dict[str, Any]:
    shares = spectra(run)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(-1)
    return {
        "top": 100 * float(shares[:, 0].mean()),
        "top_8": 100 * float(shares[:, :8].sum(-1).mean()),
        "effective_rank": float(entropy.exp().mean()),
        "curve": shares.mean(0).tolist(),
    }


def runs_by_rate(entry: Chosen, comparison: Path) -> dict[float, list[Path]]:
    """The runs of a contender: all seeds at its rate, seed 0 at the others."""
    chosen = [comparison / path for _, path in sorted(entry.runs.items())]
    others = {rate: [chosen[0].with_name(f"lr-{rate:g}-seed-0")] for rate in entry.tried}
    return others | {entry.learning_rate: chosen}


def main() -> None:
    parser = bed.parser(__doc__, "spectrum")
    parser.add_argument("--comparison", type=Path, default=Path("comparisons/default"))
    args = parser.parse_args()
    comparison = Comparison.load(args.comparison)
    rows, data = [], {}
    for entry in comparison.chosen:
        if entry.contender.method not in METHODS:
            continue
        for rate, runs in sorted(runs_by_rate(entry, args.comparison).items()):
            found = [figures(run) for run in runs]
            is_best = rate == entry.learning_rate
            score = bed.over_seeds([100 * mean for mean in comparison.means(entry.label)]) if is_best else "-"
            cells = [bed.over_seeds([one[what] for one in found]) for what in ("top", "top_8", "effective_rank")]
            rows.append([entry.label, f"{rate:g}", str(len(runs)), score, *cells])
            data[f"{entry.label}, rate {rate:g}"] = {"best": is_best, "runs": found}
    header = ["method", "rate", "seeds", "mean score", "largest value, %", "8 largest, %", "effective rank"]
    bed.show(args.to / "spectrum.json", "Singular values of the updates, as shares of their sum", header, rows, data)
    picture(data, args.to / "spectrum.png")


def picture(data: dict[str, Any], path: Path) -> None:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, entry in data.items():
        curve = torch.tensor([run["curve"] for run in entry["runs"]]).mean(0)
        axes.plot(range(1, len(curve) + 1), 100 * curve, colour(name.split()[0].strip(",")), label=name)
        axes.lines[-1].set_linestyle("-" if entry["best"] else ":")
    axes.set(yscale="log", xlabel="singular value, from the largest", ylabel="share of their sum, %", ylim=(0.01, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
