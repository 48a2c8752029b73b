from pydantic import PositiveInt

from ..banks import TensorTrain
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("loretta", paper="Yang et al. 2024, LoRETTA (rep), arXiv:2402.11417")
def loretta(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 8,
    train_rank: PositiveInt = 5,
    order: PositiveInt = 3,
    alpha: float = 16.0,
    dropout: float = 0.0,
) -> MethodConfig:
    """One LoRA shared by all tasks whose factors are tensor trains: about a tenth of LoRA's parameters.

    Exports exactly at rank `rank`. Without the biases and the trained layer norms of the published code.
    """
    bank = TensorTrain(rank=rank, train_rank=train_rank, order=order)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), dropout=dropout),))
