from pydantic import PositiveInt

from ...routing import Identity, RouterConfig, TaskTable
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, StageConfig, TaskNames, register_method
from ._options import require_between, scale


@register_method("scalearn", paper="Frohmann et al. 2023, ScaLearn, arXiv:2310.01217")
def scalearn(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 8,
    uniform: bool = False,
    scale_share: float = 0.3,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One expert per task, trained alone and then frozen; each task learns how much of every expert it wants.

    The scales are free numbers that need not sum to one, per layer, or one set for all layers (`uniform`). They are
    trained for `scale_share` of the steps, and start at the task's own expert. Exports exactly.
    """
    require_between("scale_share", scale_share, 0, 1)
    branch = BranchConfig(
        bank=Dense(experts=len(tasks), rank=rank),
        scaling=scale(alpha, rank),
        router=RouterConfig(scorer=TaskTable(diagonal=1.0), normaliser=Identity(), shared=uniform),
        dropout=dropout,
    )
    stages = (
        StageConfig(name="experts", share=1 - scale_share, train=("experts",), route="task", reduction="task"),
        StageConfig(name="scales", share=scale_share, train=("router",)),
    )
    return MethodConfig(branches=(branch,), stages=stages)
