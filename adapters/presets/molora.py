from pydantic import PositiveInt

from ...routing import BalanceLoss, RouterConfig, TokenLinear, TopK
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import require_at_most, scale


@register_method("molora", paper="Zadouri et al. 2023, MoLORA: Pushing MoE to the limit, arXiv:2309.05444")
def molora(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 8,
    rank: PositiveInt = 8,
    top_k: PositiveInt = 2,
    alpha: float | None = None,
    balance_loss: float = 0.01,
    dropout: float = 0.0,
) -> MethodConfig:
    """LoRA experts chosen token by token: the softmax-weighted `top_k` of `experts`, with a load-balancing loss."""
    require_at_most("top_k", top_k, "experts", experts)
    router = RouterConfig(scorer=TokenLinear(), normaliser=TopK(k=top_k), losses=(BalanceLoss(weight=balance_loss),))
    bank = Dense(experts=experts, rank=rank)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout),))
