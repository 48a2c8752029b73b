"""Do few adapted layers suffice? TAPS over its sparsity loss (Wallingford et al. 2022).

    python benchmarks/claims/taps.py --to claims/taps

Every task has an expert and, layer by layer, a score that says whether the layer is adapted. The last column is the
share of linears that are, over all tasks. Without the sparsity loss this is a plain LoRA per task.
"""

from typing import cast

import bed
import torch
from bed import Contender

from loramux.adapters import LoramuxModel, exact_factors
from loramux.training.run import TrainedRun

TASKS = ("where", "tomorrow", "sort", "plural")
LOSSES = (0.0, 1e-3, 1e-2, 3e-2, 1e-1)


@torch.no_grad()
def open_layers(run: TrainedRun) -> float:
    """The share of a task's linears that are adapted, the mean over tasks, in per cent."""
    hub = cast(LoramuxModel, run.model.base_model)
    adapted = [pair.rank > 0 for task in hub.tasks for pair in exact_factors(hub, task).values()]
    return 100 * bed.mean(map(float, adapted))


if __name__ == "__main__":
    args = bed.parser(__doc__, "taps").parse_args()
    contenders = {f"sparsity loss {loss:g}": Contender("taps", {"sparsity_loss": loss}) for loss in LOSSES}
    title = "Exact match in % on the test split, rank 8 per task"
    bed.contest(args, title, bed.tasks(*TASKS), contenders, rates=(3e-3,), extra={"linears adapted, %": open_layers})
