from pydantic import PositiveInt

from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, StageConfig, TaskNames, register_method
from ._options import scale, to_own_expert


@register_method("palora", paper="Dimitriadis et al. 2024, Pareto Low-Rank Adapters, arXiv:2407.08056")
def palora(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 4,
    shared_rank: PositiveInt = 4,
    annealed: bool = True,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One expert per task, weighted by a preference over tasks that the caller chooses; every preference is a model.

    Each training step draws a preference, from even ones to single tasks (`annealed`, or anywhere on the simplex),
    which weights the experts and the tasks' losses alike. Naming a task is the preference for it alone;
    `routing_tasks={"a": 0.3, "b": 0.7}` is any other, and exports exactly. Beside them acts a LoRA of `shared_rank`
    for all tasks, in the part of the paper's trained weights.
    """
    shared_branch = BranchConfig(bank=Dense(rank=shared_rank), scaling=scale(alpha, shared_rank), dropout=dropout)
    preferred = BranchConfig(
        bank=Dense(experts=len(tasks), rank=rank),
        scaling=scale(alpha, rank),
        router=to_own_expert(tasks),
        dropout=dropout,
    )
    stage = StageConfig(preferences="annealed" if annealed else "uniform", reduction="task")
    return MethodConfig(branches=(shared_branch, preferred), stages=(stage,))
