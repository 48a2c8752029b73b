from pydantic import PositiveInt

from ...routing import RouterConfig, Softmax, TokenLinear
from ..banks import BankConfig
from ..branch import BranchConfig
from ..registry import MethodConfig, register_method


@register_method("hydralora", paper="Tian et al. 2024, HydraLoRA, arXiv:2404.19245")
def hydralora(
    num_tasks: int, *, experts: PositiveInt = 3, rank: PositiveInt = 8, alpha: float | None = None, dropout: float = 0.0
) -> MethodConfig:
    """One shared A and several B heads, mixed per token by a softmax router."""
    bank = BankConfig(experts=experts, rank=rank, shared_down=True)
    router = RouterConfig(scorer=TokenLinear(), normaliser=Softmax())
    scaling = (rank if alpha is None else alpha) / rank
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scaling, router=router, dropout=dropout),))
