"""Parts of an adapter that must not move while the rest of it trains."""

from collections.abc import Iterable, Sequence
from types import EllipsisType

import torch
from torch import Tensor, nn

from ..routing.context import task_ids
from ..support.errors import AdapterError
from .banks import Dense
from .branch import Branch

Part = tuple[Tensor, Tensor | slice | EllipsisType]
"""A tensor and which of its rows are meant; `...` for the whole."""


class Held:
    """Keeps rows of tensors and puts them back, bit for bit, after an optimiser step.

    Rows share a tensor with others that train, so gradients alone cannot hold them: weight decay and momentum would
    still move them.

    Args:
        parts: what is held, parameters or buffers; a tensor that is held whole is not trained at all.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self._parts = [(tensor, rows, tensor.detach()[rows].clone()) for tensor, rows in parts]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the held rows back."""
        for tensor, rows, values in self._parts:
            tensor[rows] = values

    def freeze(self) -> None:
        """Take the gradient off what is held whole."""
        for tensor, _, values in self._parts:
            if isinstance(tensor, nn.Parameter) and values.shape == tensor.shape:
                tensor.requires_grad_(False)


def experts_of_others(branches: Iterable[Branch], tasks: list[str], trained: Sequence[str]) -> list[Part]:
    """The experts of all tasks but those that are trained.

    Args:
        branches: of all adapted layers.
        tasks: all task names, in the order of the experts.
        trained: the tasks whose experts may move.

    Raises:
        AdapterError: when experts do not belong to tasks, or a name is unknown.
    """
    free = set(task_ids(list(trained), tasks).tolist())
    others = torch.tensor([i for i in range(len(tasks)) if i not in free], dtype=torch.long)
    parts: list[Part] = []
    for branch in branches:
        bank = branch.config.bank
        if not isinstance(bank, Dense) or bank.experts != len(tasks) or bank.shared_down:
            raise AdapterError("only a method with one expert per task (such as moa) can train single tasks")
        parts += [(parameter, others.to(parameter.device)) for parameter in branch.bank.parameters()]
    return parts
