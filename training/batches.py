"""From the global order of a mixture to the micro-batches of one process.

Shapes: B rows, T tokens, N answer tokens, K tasks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..routing import prompt_mask
from ..support.errors import ConfigError
from ..tasks import EncodedTask, Mixture, collate
from .answer_logits import Answers, locate_answers, sum_by_task

Row = tuple[int, int]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes.

    Attributes:
        inputs: the model's keywords, `routing_tasks` and `routing_mask` (the prompt, never the answer) among them.
        labels: (B, T), -100 where not trained.
        answers: where the trained tokens are predicted.
        tasks: (B,) the task of each row.
        rows: (task, example) of each row.
        token_counts: (K,) answer tokens of each task.
        share: this batch's part of the rows of the global batch.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    answers: Answers
    tasks: Tensor
    rows: Sequence[Row]
    token_counts: Tensor
    share: float

    def blended(self, blend: Tensor) -> "MicroBatch":
        """The same batch, every row of it routed by one blend of tasks (K,)."""
        rows = blend.expand(len(self.tasks), -1)
        return replace(self, inputs={**self.inputs, "routing_tasks": rows})

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        labels, tasks = self.labels.to(device, non_blocking=True), self.tasks.to(device, non_blocking=True)
        return MicroBatch(moved, labels, self.answers.to(device), tasks, self.rows, self.token_counts, self.share)


class MixtureBatches:
    """This process's share of every global batch.

    Args:
        tasks: encoded tasks, in the hub's order.
        mixture: gives the global batch of a step.
        pad_id: token id of padding.
        process, processes: which share; row i of a global batch goes to process i mod processes.
        parts: micro-batches per step.
        only: the mixture of the tasks that are trained, where others are held still, and their numbers among `tasks`.
    """

    def __init__(
        self,
        tasks: Sequence[EncodedTask],
        mixture: Mixture,
        *,
        pad_id: int,
        process: int = 0,
        processes: int = 1,
        parts: int = 1,
        only: tuple[Mixture, Sequence[int]] | None = None,
    ) -> None:
        self.tasks, self.mixture, self.pad_id, self.only = tasks, mixture, pad_id, only
        self.process, self.processes, self.parts = process, processes, parts

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    @cached_property
    def padding_waste(self) -> float:
        """The share of padding among all positions that are computed."""
        return self.mixture.padding_waste(self.processes * self.parts)

    def global_batch(self, step: int, *, experts_only: bool = False) -> list[Row]:
        """(task, example) of every row of a step; `experts_only` leaves out tasks whose experts are held still."""
        if experts_only and self.only is not None:
            mixture, numbers = self.only
            return [(numbers[task], example) for task, example in mixture.batch(step)]
        return list(self.mixture.batch(step))

    def at(self, step: int, *, experts_only: bool = False) -> list[MicroBatch]:
        """This process's micro-batches of a step."""
        batch = self.global_batch(step, experts_only=experts_only)
        return [
            self._build(rows, len(batch)) for rows in rows_of_process(batch, self.process, self.processes, self.parts)
        ]

    def samples(self, count: int) -> Iterator[MicroBatch]:
        """The first `count` training examples of every task, the same on every process."""
        for task, encoded in enumerate(self.tasks):
            rows = [(task, example) for example in range(min(count, len(encoded.splits["train"])))]
            for start in range(0, len(rows), self.mixture.batch_size):
                yield self._build(rows[start : start + self.mixture.batch_size], len(rows))

    def of_each_task(self, step: int) -> Iterator[tuple[int, MicroBatch]]:
        """This process's share of equally many training examples of every task of the mixture, drawn for a step.

        As many in all as a batch has, or one of each; every micro-batch is of one task, whose number comes with it.
        """
        drawn = max(1, self.mixture.batch_size // len(self.tasks))
        most = max(1, self.mixture.batch_size // (self.processes * self.parts))
        for task, encoded in enumerate(self.tasks):
            if self.mixture.shares[task]:
                size = len(encoded.splits["train"])
                chosen = np.random.default_rng([self.mixture.seed, step, task]).permutation(size)[:drawn]
                rows = [(task, int(example)) for example in chosen[self.process :: self.processes]]
                for start in range(0, len(rows), most):
                    yield task, self._build(rows[start : start + most], len(chosen))

    def _build(self, rows: Sequence[Row], global_rows: int) -> MicroBatch:
        batch = collate([(task, self.tasks[task].splits["train"][example]) for task, example in rows], self.pad_id)
        answers, tasks = locate_answers(batch["labels"]), batch["tasks"]
        counts = sum_by_task(torch.ones(len(answers.rows)), tasks[answers.rows], len(self.tasks))
        inputs = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "routing_tasks": tasks,
            "routing_mask": prompt_mask(batch["attention_mask"], batch["labels"]),
        }
        return MicroBatch(inputs, batch["labels"], answers, tasks, rows, counts, len(rows) / global_rows)


def rows_of_process(batch: Sequence[Row], process: int, processes: int, parts: int) -> list[list[Row]]:
    """This process's rows of a global batch, in `parts` micro-batches, none of them empty.

    Raises:
        ConfigError: when the batch has fewer rows than processes x micro-batches.
    """
    if len(batch) < processes * parts:
        raise ConfigError(
            f"a global batch of {len(batch)} examples cannot be divided over {processes} processes x {parts} "
            "micro-batches; raise train.batch_size or lower train.accumulation"
        )
    mine = batch[process::processes]
    return [list(mine[part::parts]) for part in range(parts)]
