from pydantic import PositiveInt

from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, StageConfig, TaskNames, register_method
from ._options import scale, to_own_expert


@register_method("clp", paper="Wang et al. 2024, Conditional Language Policy, arXiv:2407.15762")
def clp(tasks: TaskNames, *, rank: PositiveInt = 8, alpha: float | None = None, dropout: float = 0.0) -> MethodConfig:
    """One expert per task, mixed by weights over tasks that the caller chooses, trained on weights from everywhere.

    The paper's full parameter mixing, with the tasks' own losses where it has rewards. `routing_tasks={"a": 0.3, "b":
    0.7}` asks for any mixture, and exports exactly.
    """
    branch = BranchConfig(
        bank=Dense(experts=len(tasks), rank=rank),
        scaling=scale(alpha, rank),
        router=to_own_expert(tasks),
        dropout=dropout,
    )
    return MethodConfig(branches=(branch,), stages=(StageConfig(preferences="uniform", reduction="task"),))
