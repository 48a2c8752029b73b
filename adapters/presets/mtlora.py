from pydantic import PositiveInt

from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import to_own_expert


@register_method("mtlora", paper="Agiza et al. 2024, MTLoRA, CVPR 2024, arXiv:2403.20320")
def mtlora(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 16,
    task_rank: PositiveInt = 4,
    scaling: float = 4.0,
    dropout: float = 0.05,
) -> MethodConfig:
    """One LoRA that all tasks share and a small one of each task's own, added.

    This is the paper's `matrixv2`, the form with one stream; `scaling` is its factor on both. Exports exactly, at rank
    `rank + task_rank`.
    """
    shared_branch = BranchConfig(bank=Dense(rank=rank), scaling=scaling, dropout=dropout)
    own_branch = BranchConfig(
        bank=Dense(experts=len(tasks), rank=task_rank), scaling=scaling, router=to_own_expert(tasks), dropout=dropout
    )
    return MethodConfig(branches=(shared_branch, own_branch))
