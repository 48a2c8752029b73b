from pydantic import PositiveInt

from ...routing import FixedTable, Identity, RouterConfig
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import per_task, scale


@register_method("skillnet", paper="Liao et al. 2022, SkillNet-NLG, arXiv:2204.12184")
def skillnet(
    tasks: TaskNames,
    *,
    skills: dict[str, list[str]] | None = None,
    rank: PositiveInt = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """Experts are skills, and a table that people write says which skills a task needs; they are averaged.

    `skills` names them per task, for example `{summaries: [general, writing], intents: [general, understanding]}`.
    Without it every task has a skill of its own beside a `general` one. Exports exactly.
    """
    table = {task: ["general", task] for task in tasks} if skills is None else skills
    per_task("skills", table, tasks)
    names = list(dict.fromkeys(skill for task in tasks for skill in table[task]))  # new tasks add theirs at the end
    if not all(table.values()):
        raise ValueError(f"skills: {next(task for task in tasks if not table[task])} needs at least one skill")
    rows = tuple(tuple((name in table[task]) / len(set(table[task])) for name in names) for task in tasks)
    router = RouterConfig(scorer=FixedTable(rows=rows), normaliser=Identity())
    bank = Dense(experts=len(names), rank=rank)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout),))
