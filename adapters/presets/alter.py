from pydantic import PositiveInt

from ...routing import RouterConfig, Softmax, TaskTable
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, StageConfig, TaskNames, register_method
from ._options import require_between, scale


@register_method("alter", paper="Xie et al. 2023, ALTER / Mixture-of-Task-Adapters, arXiv:2309.11042")
def alter(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 8,
    warmth: float = 4.0,
    gate_share: float = 0.3,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One expert per task, trained alone first; then a gate per task mixes in what the other tasks' experts know.

    The gate starts `warmth` nats in favour of the task's own expert and is trained, with the experts, for `gate_share`
    of the steps. Exports exactly, at rank `tasks * rank` or compressed to what that is worth.
    """
    require_between("gate_share", gate_share, 0, 1)
    router = RouterConfig(scorer=TaskTable(diagonal=warmth), normaliser=Softmax())
    bank = Dense(experts=len(tasks), rank=rank)
    stages = (
        StageConfig(name="experts", share=1 - gate_share, train=("experts",), route="task", reduction="task"),
        StageConfig(name="gates", share=gate_share),
    )
    branch = BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout)
    return MethodConfig(branches=(branch,), stages=stages)
