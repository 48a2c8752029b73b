from pydantic import PositiveInt

from ...routing import DSelectK, Penalty, RouterConfig, TaskTable
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import require_at_most, scale


@register_method("dselect_k", paper="Hazimeh et al. 2021, DSelect-k, arXiv:2106.03760")
def dselect_k(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 8,
    rank: PositiveInt = 4,
    top_k: PositiveInt = 2,
    gamma: float = 1.0,
    entropy_loss: float = 1e-2,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """Each task selects at most `top_k` of the experts through binary codes of smooth steps, sparse in the end.

    `entropy_loss` drives the codes to whole numbers; once they are, an export holds only the experts its task chose.
    """
    require_at_most("top_k", top_k, "experts", experts)
    router = RouterConfig(
        scorer=TaskTable(init_std=gamma / 100),
        normaliser=DSelectK(k=top_k, gates=experts, gamma=gamma),
        losses=(Penalty(weight=entropy_loss),),
    )
    bank = Dense(experts=experts, rank=rank)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout),))
