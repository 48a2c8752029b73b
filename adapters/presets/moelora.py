from pydantic import PositiveInt

from ...routing import RouterConfig, Softmax, TaskEmbedding
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("moelora", paper="Liu et al. 2023, MOELoRA, arXiv:2310.18339")
def moelora(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 8,
    rank: PositiveInt = 2,
    task_dim: PositiveInt = 64,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """LoRA experts of small `rank`, mixed by a softmax over a linear map of a trained task vector.

    The paper splits a total rank of 16 over its 8 experts. Exports exactly, at rank `experts * rank`.
    """
    router = RouterConfig(scorer=TaskEmbedding(dim=task_dim), normaliser=Softmax())
    bank = Dense(experts=experts, rank=rank)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout),))
