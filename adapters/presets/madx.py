from pydantic import PositiveInt

from ...routing import FixedTable, Identity, RouterConfig
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import per_task, scale, to_own_expert


@register_method("madx", paper="Pfeiffer et al. 2020, MAD-X (parallel low-rank form), arXiv:2005.00052")
def madx(
    tasks: TaskNames,
    *,
    languages: dict[str, str] | None = None,
    rank: PositiveInt = 8,
    language_rank: PositiveInt = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """An expert per language and an expert per task, added: a task in another language takes that language's expert.

    `languages` names the language of every task. The paper stacks bottleneck adapters and has invertible ones at the
    embeddings; this is its low-rank form side by side. Exports exactly, at rank `rank + language_rank`.
    """
    spoken = {task: "one" for task in tasks} if languages is None else languages
    per_task("languages", spoken, tasks)
    names = list(dict.fromkeys(spoken[task] for task in tasks))  # new tasks add theirs at the end
    of_language = FixedTable(rows=tuple(tuple(float(spoken[task] == name) for name in names) for task in tasks))
    language = BranchConfig(
        bank=Dense(experts=len(names), rank=language_rank),
        scaling=scale(alpha, language_rank),
        router=RouterConfig(scorer=of_language, normaliser=Identity()),
        dropout=dropout,
    )
    task = BranchConfig(
        bank=Dense(experts=len(tasks), rank=rank),
        scaling=scale(alpha, rank),
        router=to_own_expert(tasks),
        dropout=dropout,
    )
    return MethodConfig(branches=(language, task))
