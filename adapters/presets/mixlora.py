from pydantic import PositiveInt

from ...routing import BalanceLoss, RouterConfig, TokenLinear, TopK
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import require_at_most, scale


@register_method("mixlora", paper="Li et al. 2024, MixLoRA, arXiv:2404.15159")
def mixlora(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 8,
    top_k: PositiveInt = 2,
    rank: PositiveInt = 16,
    alpha: float | None = 32.0,
    balance_loss: float = 0.01,
    router_init: float = 0.02,
    dropout: float = 0.0,
) -> MethodConfig:
    """Experts through the feed-forward blocks, the `top_k` best per token; a plain LoRA everywhere else.

    An expert is the block of the frozen model with LoRAs of its own on its linears, and what experts say is mixed after
    the block, so after its nonlinearity. The block runs once per expert on the tokens that chose it.
    """
    require_at_most("top_k", top_k, "experts", experts)
    router = RouterConfig(
        scorer=TokenLinear(init_std=router_init),
        normaliser=TopK(k=top_k),
        losses=(BalanceLoss(weight=balance_loss),),
        per_block=True,
    )
    plain = BranchConfig(bank=Dense(rank=rank), scaling=scale(alpha, rank), dropout=dropout)
    expert = BranchConfig(
        bank=Dense(experts=experts, rank=rank), scaling=scale(alpha, rank), router=router, dropout=dropout
    )
    return MethodConfig(branches=(plain,), in_blocks=(expert,))
