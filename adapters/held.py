"""Experts that must not move while others train."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..routing.context import task_ids
from ..support.errors import AdapterError
from .banks import Dense
from .branch import Branch


class HeldRows:
    """Keeps the rows of experts that are not trained and puts them back, bit for bit, after an optimiser step.

    Experts are stacked in one tensor, so gradients alone cannot hold some of them: weight decay and momentum would
    still move them.

    Args:
        branches: of all adapted layers.
        tasks: all task names, in the order of the experts.
        trained: the tasks whose experts may move.

    Raises:
        AdapterError: when experts do not belong to tasks, or a name is unknown.
    """

    def __init__(self, branches: Iterable[Branch], tasks: list[str], trained: Sequence[str]) -> None:
        free = set(task_ids(list(trained), tasks).tolist())
        held = torch.tensor([i for i in range(len(tasks)) if i not in free], dtype=torch.long)
        self._rows: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for branch in branches:
            bank = branch.config.bank
            if not isinstance(bank, Dense) or bank.experts != len(tasks) or bank.shared_down:
                raise AdapterError("only a method with one expert per task (such as moa) can train single tasks")
            for parameter in branch.bank.parameters():
                rows = held.to(parameter.device)
                self._rows.append((parameter, rows, parameter.detach()[rows].clone()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the held rows back."""
        for parameter, rows, values in self._rows:
            parameter[rows] = values
