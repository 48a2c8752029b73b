from pydantic import PositiveInt

from ..banks import BankConfig
from ..branch import BranchConfig
from ..registry import MethodConfig, register_method


@register_method("lora", paper="Hu et al. 2021, LoRA, arXiv:2106.09685")
def lora(num_tasks: int, *, rank: PositiveInt = 8, alpha: float | None = None, dropout: float = 0.0) -> MethodConfig:
    """One low-rank update shared by all tasks: the baseline of every table.

    `alpha` defaults to the rank (scale 1).
    """
    scaling = (rank if alpha is None else alpha) / rank
    return MethodConfig(branches=(BranchConfig(bank=BankConfig(rank=rank), scaling=scaling, dropout=dropout),))
