from pydantic import PositiveInt

from ...routing import RouterConfig, Softmax, TokenLinear
from ..banks import Cored
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("comol", paper="CoMoL 2026, Core mixture of LoRA experts, arXiv:2603.00573")
def comol(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 4,
    rank: PositiveInt = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One A and one B; the experts are small matrices between them, mixed per token by a softmax router.

    The router is small too: it reads a token as A shows it.
    """
    router = RouterConfig(scorer=TokenLinear(), normaliser=Softmax(), projected=True)
    bank = Cored(experts=experts, rank=rank)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout),))
