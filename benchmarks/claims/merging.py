"""Can one merged LoRA replace a routed hub? PEFT's merges of the exported tasks against the hub they came from.

    python benchmarks/claims/merging.py --comparison comparisons/default --to claims/merging

Takes the tasks that MoA exported in the first comparison of docs/results.md (one LoRA of rank 8 each) and merges them
by stock PEFT's `add_weighted_adapter`: task arithmetic on updates (`cat`, exact) and on factors (`linear`), TIES and
DARE. The common weight of each merge is chosen on validation examples.
"""

from pathlib import Path
from typing import Any

import bed
import torch
from peft import PeftModel

from loramux.tasks import EncodedTask, load_tasks
from loramux.training.comparison import Comparison
from loramux.training.evaluate import evaluate_tasks
from loramux.training.recipe import Recipe
from loramux.training.run import encode_all, open_base

SOURCE = "moa"
WEIGHTS = (0.125, 0.4, 1.0)
MERGES: dict[str, dict[str, Any]] = {
    "task arithmetic, updates": {"combination_type": "cat"},
    "task arithmetic, factors": {"combination_type": "linear"},
    "TIES, 20 % kept": {"combination_type": "ties", "density": 0.2},
    "TIES, 50 % kept": {"combination_type": "ties", "density": 0.5},
    "DARE, 50 % kept": {"combination_type": "dare_linear", "density": 0.5},
    "DARE with TIES, 50 % kept": {"combination_type": "dare_ties", "density": 0.5},
}


class Merger:
    """The tasks of one run, as stock PEFT loads them."""

    def __init__(self, exports: Path) -> None:
        base, self.tokenizer = open_base(Recipe())
        self.tasks: list[EncodedTask] = encode_all(load_tasks("default"), Recipe(), self.tokenizer, base)
        self.names = [task.name for task in self.tasks]
        first, *others = self.names
        self.model = PeftModel.from_pretrained(base, str(exports / first), adapter_name=first)
        for name in others:
            self.model.load_adapter(str(exports / name), adapter_name=name)

    def score(self, how: dict[str, Any], weight: float, split: str) -> dict[str, float]:
        """Every task's main metric, in per cent, of one merge of all tasks."""
        torch.manual_seed(0)  # DARE drops at random
        self.model.add_weighted_adapter(self.names, [weight] * len(self.names), adapter_name="merged", **how)
        self.model.set_adapter("merged")
        found = evaluate_tasks(self.model.eval(), self.tokenizer, self.tasks, split=split, title=None)
        self.model.delete_adapter("merged")
        return bed.main_metrics(found)


def main() -> None:
    parser = bed.parser(__doc__, "merging")
    parser.add_argument("--comparison", type=Path, default=Path("comparisons/default"))
    args = parser.parse_args()
    comparison = Comparison.load(args.comparison)
    (entry,) = [entry for entry in comparison.chosen if entry.label == SOURCE]
    mergers = [Merger(args.comparison / entry.runs[seed] / "exports") for seed in args.seeds]
    rows, data = [], {}
    for name, how in MERGES.items():
        tried = {weight: bed.mean(mergers[0].score(how, weight, "validation").values()) for weight in WEIGHTS}
        weight = max(tried, key=lambda weight: tried[weight])
        found = [merger.score(how, weight, "test") for merger in mergers]
        means, worsts = [bed.mean(one.values()) for one in found], [min(one.values()) for one in found]
        rows.append([name, f"{weight:g}", bed.over_seeds(means), bed.over_seeds(worsts)])
        data[name] = {"tried": tried, "weight": weight, "scores": found}
    rows += [anchor(comparison, *which) for which in ANCHORS]
    header = ["one model for all tasks", "weight", "mean", "worst task"]
    bed.show(args.to / "merging.json", "Main metrics in %, merges of eight exported tasks", header, rows, data)


ANCHORS = (
    ("one LoRA trained on all tasks, r64", "lora r64", None),
    ("the hub, router decides", SOURCE, "auto"),
    ("the hub, task named", SOURCE, "named"),
)


def anchor(comparison: Comparison, name: str, label: str, column: str | None) -> list[str]:
    means = [100 * mean for mean in comparison.means(label, column)]
    return [name, "-", bed.over_seeds(means), "-"]


if __name__ == "__main__":
    main()
