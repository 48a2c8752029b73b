from pydantic import PositiveInt

from ...routing import RouterConfig, SigmoidTopK, TokenLinear
from ..banks import Dense
from ..branch import BranchConfig
from ..cores import OutputMix
from ..registry import MethodConfig, TaskNames, register_method
from ._options import require_at_most


@register_method("smora", paper="Zhao et al. 2025, SMoRA: each rank could be an expert, arXiv:2501.15103")
def smora(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 64,
    top_k: PositiveInt = 8,
    block_size: PositiveInt = 1,
    alpha: float = 16.0,
    balance_rate: float = 1e-5,
    dropout: float = 0.0,
) -> MethodConfig:
    """One LoRA whose ranks are experts: each token opens `top_k` of `rank` ranks, in blocks of `block_size`.

    Load is balanced by a selection bias that moves `balance_rate` per step. Unlike the published code, the bias never
    enters the weight of a rank (DeepSeek's rule), is synchronised over processes, and the router sees inputs without
    dropout.
    """
    if rank % block_size or top_k % block_size:
        raise ValueError(f"block_size (={block_size}) must divide rank (={rank}) and top_k (={top_k})")
    require_at_most("top_k", top_k, "rank", rank)
    router = RouterConfig(
        scorer=TokenLinear(init_std=None),
        normaliser=SigmoidTopK(k=top_k // block_size, balance_rate=balance_rate),
    )
    branch = BranchConfig(
        bank=Dense(rank=rank),
        scaling=alpha / top_k,
        router=router,
        core=OutputMix(block_size=block_size),
        dropout=dropout,
    )
    return MethodConfig(branches=(branch,))
