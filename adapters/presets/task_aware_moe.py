from typing import Literal

from pydantic import PositiveInt

from ...routing import BalanceLoss, RouterConfig, TokenAndTask, TopK
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import require_at_most, scale


@register_method(
    "task_aware_moe", paper="Gupta et al. 2022, Sparsely activated MoE are robust multi-task learners, arXiv:2204.07689"
)
def task_aware_moe(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 8,
    rank: PositiveInt = 8,
    top_k: PositiveInt = 2,
    gate: Literal["joined", "separate"] = "joined",
    task_dim: PositiveInt = 32,
    alpha: float | None = None,
    balance_loss: float = 0.01,
    dropout: float = 0.0,
) -> MethodConfig:
    """LoRA experts chosen token by token by a gate that also knows the task.

    The gate reads the token beside a trained task vector (`joined`), or is another one per task (`separate`).
    """
    require_at_most("top_k", top_k, "experts", experts)
    router = RouterConfig(
        scorer=TokenAndTask(form=gate, dim=task_dim),
        normaliser=TopK(k=top_k),
        losses=(BalanceLoss(weight=balance_loss),),
    )
    bank = Dense(experts=experts, rank=rank)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout),))
