from pydantic import PositiveInt

from ...routing import RouterConfig, Softmax, TokenLinear
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("hydralora", paper="Tian et al. 2024, HydraLoRA, arXiv:2404.19245")
def hydralora(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 3,
    rank: PositiveInt = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One shared A and several B heads, mixed per token by a softmax router."""
    bank = Dense(experts=experts, rank=rank, shared_down=True)
    router = RouterConfig(scorer=TokenLinear(), normaliser=Softmax())
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout),))
