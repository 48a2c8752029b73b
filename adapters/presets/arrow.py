from pydantic import PositiveInt

from ...routing import RouterConfig, TokenPrototypes, TopK
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, StageConfig, TaskNames, register_method
from ._options import scale


@register_method("arrow", paper="Ostapenko et al. 2024, Arrow: Towards modular LLMs, arXiv:2405.11157")
def arrow(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 8,
    top_k: PositiveInt = 3,
    temperature: float = 1.0,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One LoRA per task, trained alone, and a token router without training.

    At every layer a token goes to the `top_k` experts whose deltas answer most to its direction: the first
    right-singular vector of each.
    """
    branch = BranchConfig(
        bank=Dense(experts=len(tasks), rank=rank),
        scaling=scale(alpha, rank),
        router=RouterConfig(scorer=TokenPrototypes(), normaliser=TopK(k=top_k, temperature=temperature)),
        dropout=dropout,
    )
    stage = StageConfig(name="experts", train=("experts",), route="task", reduction="task", after=("fit_prototypes",))
    return MethodConfig(branches=(branch,), stages=(stage,))
