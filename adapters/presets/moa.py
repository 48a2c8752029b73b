from pydantic import PositiveInt

from ...routing import Argmax, LabelLoss, PooledPrompt, RouterConfig
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, StageConfig, TaskNames, register_method
from ._options import require_between, scale


@register_method("moa", paper="Feng et al. 2024, Mixture-of-LoRAs, arXiv:2403.03432")
def moa(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    label_loss: float = 1.0,
    router_share: float = 0.25,
    router_hidden: PositiveInt | None = None,
) -> MethodConfig:
    """One LoRA per task and a router that picks one for the whole sequence from the prompt.

    Stage 1 trains all experts side by side, each on its own task. Stage 2 (`router_share` of the steps) trains experts
    and router together, the router on task labels with weight `label_loss`. A caller who names the task overrides the
    router. The router reads the frozen base alone, so its loss never bends an expert, and a task can be re-trained or
    added later without touching the others. Each task exports exactly, as the LoRA it is.
    """
    require_between("router_share", router_share, 0, 1)
    router = RouterConfig(
        scorer=PooledPrompt(hidden=router_hidden),
        normaliser=Argmax(),
        shared=True,
        losses=(LabelLoss(weight=label_loss),),
    )
    branch = BranchConfig(
        bank=Dense(experts=len(tasks), rank=rank),
        scaling=scale(alpha, rank),
        router=router,
        dropout=dropout,
    )
    stages = (
        StageConfig(name="experts", share=1 - router_share, train=("experts",), reduction="task"),
        StageConfig(name="router", share=router_share, train=("experts", "router"), reduction="task"),
    )
    return MethodConfig(branches=(branch,), stages=stages)
