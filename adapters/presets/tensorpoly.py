from typing import Literal

from pydantic import PositiveInt

from ...routing import RouterConfig, SigmoidShare, TaskTable
from ..banks import TensorProduct
from ..branch import BranchConfig
from ..cores import FactorMix, InnerMix
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("tensorpoly", paper="Su et al. 2024, TensorPoly, arXiv:2405.16671")
def tensorpoly(
    tasks: TaskNames,
    *,
    variant: Literal["I", "II"] = "I",
    skills: PositiveInt = 8,
    rank: PositiveInt = 16,
    order: PositiveInt = 4,
    alpha: float = 1.0,
    dropout: float = 0.0,
) -> MethodConfig:
    """Poly with skills that are tensor products of `order` short leaves: a few per cent of Poly's parameters.

    Variant I averages the skills' factors; variant II averages their leaves, each order by weights of its own. Exports
    exactly at rank `rank`. Unlike the published code, products are not normalised and the last leaf of B starts at
    zero, so that training starts at the base.
    """
    router = RouterConfig(
        scorer=TaskTable(init_std=1e-3), normaliser=SigmoidShare(), groups=1 if variant == "I" else order
    )
    branch = BranchConfig(
        bank=TensorProduct(experts=skills, rank=rank, order=order),
        core=FactorMix() if variant == "I" else InnerMix(),
        scaling=scale(alpha, rank),
        router=router,
        dropout=dropout,
    )
    return MethodConfig(branches=(branch,))
