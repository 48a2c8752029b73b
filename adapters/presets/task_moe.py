from pydantic import PositiveInt

from ...routing import GumbelSoftmax, RouterConfig, TaskEmbedding
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, StageConfig, TaskNames, register_method
from ._options import require_between, scale


@register_method("task_moe", paper="Ye et al. 2022, Task-level mixture of experts, arXiv:2205.12701")
def task_moe(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 3,
    rank: PositiveInt = 8,
    task_dim: PositiveInt = 64,
    hidden: PositiveInt = 64,
    hard: bool = False,
    route_share: float | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """Experts mixed per task and layer by a small network on a trained task vector.

    `hard` takes one expert, by a straight-through Gumbel softmax, where the default mixes them. With `route_share`
    routes are learned for that share of the steps; then they are frozen, and the experts start anew (the paper's
    second stage, without annealing from even weights). An unseen task is routed by a blend of the tasks it is like
    (`routing_tasks={"a": 0.5, "b": 0.5}`). Exports exactly.
    """
    router = RouterConfig(scorer=TaskEmbedding(dim=task_dim, hidden=hidden), normaliser=GumbelSoftmax(hard=hard))
    bank = Dense(experts=experts, rank=rank)
    branch = BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout)
    if route_share is None:
        return MethodConfig(branches=(branch,))
    require_between("route_share", route_share, 0, 1)
    stages = (
        StageConfig(name="routes", share=route_share, after=("reset_experts",)),
        StageConfig(name="experts", share=1 - route_share, train=("experts",)),
    )
    return MethodConfig(branches=(branch,), stages=stages)
