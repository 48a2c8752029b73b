from pydantic import PositiveInt

from ...routing import RouterConfig, TokenLinear, TopK
from ..banks import BankConfig
from ..branch import BranchConfig
from ..registry import MethodConfig, register_method


@register_method("molora", paper="Zadouri et al. 2023, MoLORA: Pushing MoE to the limit, arXiv:2309.05444")
def molora(
    num_tasks: int,
    *,
    experts: PositiveInt = 8,
    rank: PositiveInt = 8,
    top_k: PositiveInt = 2,
    alpha: float | None = None,
    balance_loss: float = 0.01,
    dropout: float = 0.0,
) -> MethodConfig:
    """LoRA experts chosen token by token: the softmax-weighted `top_k` of `experts`, with a load-balancing loss."""
    if top_k > experts:
        raise ValueError(f"top_k (={top_k}) must be at most experts (={experts}); lower it or add experts")
    router = RouterConfig(scorer=TokenLinear(), normaliser=TopK(k=top_k), balance_loss=balance_loss)
    branch = BranchConfig(
        bank=BankConfig(experts=experts, rank=rank),
        scaling=(rank if alpha is None else alpha) / rank,
        router=router,
        dropout=dropout,
    )
    return MethodConfig(branches=(branch,))
