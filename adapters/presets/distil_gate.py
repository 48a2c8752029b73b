from pydantic import PositiveInt

from ...routing import BudgetLoss, NoisyStep, OwnTokenGate, RouterConfig
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import require_between, scale


@register_method("distil_gate", paper="Ferraz et al. 2023, DistilWhisper, arXiv:2311.01070")
def distil_gate(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 8,
    hidden: PositiveInt = 64,
    budget: float = 0.5,
    budget_loss: float = 1.0,
    noise: float = 1.0,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One expert per task, and a gate that decides token by token whether to use it or the frozen base alone.

    `budget_loss` keeps the share of tokens that use it near `budget`. The gate is hard in evaluation; `noise` drives
    its scores that way in training, all along where the paper's grows. Without the distillation from a larger model.
    """
    require_between("budget", budget, 0, 1)
    router = RouterConfig(
        scorer=OwnTokenGate(hidden=hidden),
        normaliser=NoisyStep(noise=noise),
        losses=(BudgetLoss(weight=budget_loss, budget=budget),),
    )
    bank = Dense(experts=len(tasks), rank=rank)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout),))
