from pydantic import PositiveInt

from ...routing import BalanceLoss, RouterConfig, TokenLinear, TopK
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import require_at_most, scale


@register_method("mola", paper="Gao et al. 2024, MoLA: Higher layers need more LoRA experts, arXiv:2402.08562")
def mola(
    tasks: TaskNames,
    *,
    experts: tuple[PositiveInt, ...] = (2, 4, 6, 8),
    rank: PositiveInt = 8,
    top_k: PositiveInt = 2,
    alpha: float | None = None,
    balance_loss: float = 0.01,
    dropout: float = 0.0,
) -> MethodConfig:
    """LoRA experts chosen token by token, more of them in higher layers: one number for each section of the depth.

    The scale is 1 at every rank, so that a rank can be compared without its learning rate; the paper's is `alpha=16` at
    rank 8.
    """
    require_at_most("top_k", top_k, "experts", min(experts, default=0))
    router = RouterConfig(scorer=TokenLinear(), normaliser=TopK(k=top_k), losses=(BalanceLoss(weight=balance_loss),))
    sections = tuple(
        (
            BranchConfig(
                bank=Dense(experts=count, rank=rank), scaling=scale(alpha, rank), router=router, dropout=dropout
            ),
        )
        for count in experts
    )
    return MethodConfig(branches=sections[-1], by_depth=sections)
