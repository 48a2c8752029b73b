from pydantic import PositiveInt

from ...routing import Argmax, PromptPrototypes, RouterConfig
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, StageConfig, TaskNames, register_method
from ._options import scale


@register_method("router_retriever", paper="Lee et al. 2024, RouterRetriever, arXiv:2409.02685")
def router_retriever(
    tasks: TaskNames, *, rank: PositiveInt = 8, alpha: float | None = None, dropout: float = 0.0
) -> MethodConfig:
    """One LoRA per task, and a router without training: the task whose mean prompt is nearest to this prompt.

    Prompts are read by the frozen base, so experts come and go without touching the others. Each task exports exactly,
    as the LoRA it is. The paper keeps one mean prompt for every dataset and expert that is best on it; this keeps one
    for every task.
    """
    branch = BranchConfig(
        bank=Dense(experts=len(tasks), rank=rank),
        scaling=scale(alpha, rank),
        router=RouterConfig(scorer=PromptPrototypes(), normaliser=Argmax(), shared=True),
        dropout=dropout,
    )
    stage = StageConfig(name="experts", train=("experts",), reduction="task", after=("fit_prototypes",))
    return MethodConfig(branches=(branch,), stages=(stage,))
