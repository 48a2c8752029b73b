from pydantic import PositiveInt

from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("lora", paper="Hu et al. 2021, LoRA, arXiv:2106.09685")
def lora(tasks: TaskNames, *, rank: PositiveInt = 8, alpha: float | None = None, dropout: float = 0.0) -> MethodConfig:
    """One low-rank update shared by all tasks: the baseline of every table.

    `alpha` defaults to the rank (scale 1).
    """
    return MethodConfig(branches=(BranchConfig(bank=Dense(rank=rank), scaling=scale(alpha, rank), dropout=dropout),))
