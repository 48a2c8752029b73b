"""Parts of an adapter that must not move while the rest of it trains."""

from collections.abc import Iterable, Sequence
from types import EllipsisType

import torch
from torch import Tensor, nn

from ..routing import FixedTable, Granularity, OwnScore, OwnTokenGate
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


def all_but_own_experts(
    branches: Iterable[Branch], tasks: list[str], trained: Sequence[str], *, alone: bool
) -> list[Part]:
    """The experts of the tasks that are not trained, their own gates, and the experts that they share with others.

    Routers that learn to choose between experts are no part of it.

    Args:
        branches: of all adapted layers.
        tasks: all task names, in the order of their ids.
        trained: the tasks whose own experts may move; where there are none, no expert may.
        alone: whether there is an expert per task, which trains on that task's rows alone.

    Raises:
        AdapterError: when no expert belongs to single tasks, or a name is unknown.
    """
    if not trained:
        return [(parameter, ...) for branch in branches for parameter in branch.bank.parameters()]
    free = set(task_ids(list(trained), tasks).tolist())
    others = torch.tensor([i for i in range(len(tasks)) if i not in free], dtype=torch.long)
    parts: list[Part] = []
    shared = True
    for branch in branches:
        users = _users(branch, len(tasks), alone)
        if users is None:
            parts += [(parameter, ...) for parameter in branch.parameters()]
            continue
        shared = False
        rows = users[others].any(0).nonzero().flatten()
        parts += [(parameter, rows.to(parameter.device)) for parameter in branch.bank.parameters()]
        if branch.router is not None and isinstance(branch.router.config.scorer, OwnScore | OwnTokenGate):
            kept = others if branch.router.config.scorer.is_task_logits else ...
            parts += [(parameter, kept) for parameter in branch.router.parameters()]
    if shared:
        raise AdapterError("only a method with one expert per task (such as moa) can train single tasks")
    return parts


def belong_to_tasks(branches: Iterable[Branch], tasks: int, *, alone: bool) -> bool:
    """Whether every expert that is routed to is that of one task, the first of the first and so on."""
    routed = [_users(branch, tasks, alone) for branch in branches if branch.config.router is not None]
    return all(users is not None and torch.equal(users, torch.eye(tasks, dtype=torch.bool)) for users in routed)


def _users(branch: Branch, tasks: int, alone: bool) -> Tensor | None:
    """`(tasks, experts)`: which tasks use which expert when they are named; None where they share all of them."""
    config, bank = branch.config, branch.config.bank
    if config.router is None or not isinstance(bank, Dense) or bank.shared_down or config.gates != bank.experts:
        return None
    scorer = config.router.scorer
    if isinstance(scorer, FixedTable) and config.router.most_open is not None:
        return torch.tensor(scorer.rows) != 0
    if alone or scorer.granularity == Granularity.SEQUENCE or isinstance(scorer, OwnScore | OwnTokenGate):
        return torch.eye(tasks, dtype=torch.bool)
    return None
