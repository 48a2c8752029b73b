"""Where a run stands: what a checkpoint remembers besides tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Progress:
    """JSON-safe state of a run.

    Attributes:
        best_step, best_score: of the best evaluation of the last stage.
        stopped: whether too many evaluations in a row brought no gain.
        answer_tokens: trained tokens so far.
        loss_sums, token_counts: per task, since the last log line.
        logged_step: of the last log line.
        routing: per router the tokens, their entropies and the weights of each gate, summed since the last log line.
        collapsed_for: per router the steps that one expert has carried nearly everything.
        warned_of_collapse: whether the user was told.
    """

    step: int = 0
    best_step: int | None = None
    best_score: float | None = None
    evaluations_without_gain: int = 0
    stopped: bool = False
    answer_tokens: int = 0
    loss_sums: list[float] = field(default_factory=list)
    token_counts: list[float] = field(default_factory=list)
    logged_step: int = 0
    routing: dict[str, list[float]] = field(default_factory=dict)
    collapsed_for: dict[str, int] = field(default_factory=dict)
    warned_of_collapse: bool = False

    def add(self, sums: Tensor, counts: Tensor) -> None:
        """Count one step's losses (K,) and answer tokens (K,), by task."""
        if not self.loss_sums:
            self.loss_sums, self.token_counts = [0.0] * len(sums), [0.0] * len(counts)
        self.loss_sums = [a + b for a, b in zip(self.loss_sums, sums.tolist(), strict=True)]
        self.token_counts = [a + b for a, b in zip(self.token_counts, counts.tolist(), strict=True)]
        self.answer_tokens += int(counts.sum())

    def take_losses(self, names: Sequence[str]) -> dict[str, float]:
        """Mean loss per answer token since the last call, in all and of each task that was seen."""
        sums, counts = self.loss_sums, self.token_counts
        self.loss_sums, self.token_counts = [], []
        rows = zip(names, sums, counts, strict=True)
        by_task = {f"train/loss/{name}": total / count for name, total, count in rows if count}
        return {"train/loss": sum(sums) / sum(counts), **by_task}

    def consider(self, score: float, patience: int | None) -> bool:
        """Whether `score` is the best so far; after `patience` scores in a row that are not, `stopped` is set."""
        if math.isfinite(score) and (self.best_score is None or score > self.best_score):
            self.best_step, self.best_score, self.evaluations_without_gain = self.step, score, 0
            return True
        self.evaluations_without_gain += 1
        self.stopped = self.evaluations_without_gain == patience
        return False
