from pydantic import PositiveInt

from ..banks import TensorProduct
from ..branch import BranchConfig
from ..cores import FactorMix
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("tlora", paper="Su et al. 2024, TLoRA in TensorPoly, arXiv:2405.16671")
def tlora(
    tasks: TaskNames,
    *,
    terms: PositiveInt = 8,
    rank: PositiveInt = 16,
    order: PositiveInt = 4,
    alpha: float = 1.0,
    dropout: float = 0.0,
) -> MethodConfig:
    """One LoRA shared by all tasks whose factors are sums of `terms` tensor products of short leaves.

    The dense counterpart of TensorPoly. Exports exactly at rank `rank`.
    """
    bank = TensorProduct(experts=terms, rank=rank, order=order)
    return MethodConfig(
        branches=(BranchConfig(bank=bank, core=FactorMix(), scaling=scale(alpha, rank), dropout=dropout),)
    )
