from pydantic import PositiveInt

from ...routing import FirstPass, RouterConfig, Softmax, TopK
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, StageConfig, TaskNames, register_method
from ._options import require_between, scale


@register_method("xlora", paper="Buehler and Buehler 2024, X-LoRA, arXiv:2402.07148")
def xlora(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 8,
    top_k: PositiveInt | None = None,
    temperature: float = 1.0,
    router_hidden: PositiveInt | None = None,
    router_dropout: float = 0.2,
    router_share: float = 0.3,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One LoRA per task, trained alone and then frozen; a pass of the frozen base decides how every layer mixes them.

    Before each pass that answers, the base reads the same tokens, and a network on its last hidden states weights every
    expert for every token and layer, by a softmax over all of them or over the `top_k` best. That costs as much again.
    The network is linear, or has one layer of `router_hidden` with `router_dropout`, and trains for `router_share` of
    the steps.
    """
    require_between("router_share", router_share, 0, 1)
    scorer = FirstPass(hidden=router_hidden, dropout=router_dropout)
    normaliser = Softmax(temperature=temperature) if top_k is None else TopK(k=top_k, temperature=temperature)
    branch = BranchConfig(
        bank=Dense(experts=len(tasks), rank=rank),
        scaling=scale(alpha, rank),
        router=RouterConfig(scorer=scorer, normaliser=normaliser, shared=True),
        dropout=dropout,
    )
    stages = (
        StageConfig(name="experts", share=1 - router_share, train=("experts",), route="task", reduction="task"),
        StageConfig(name="router", share=router_share, train=("router",)),
    )
    return MethodConfig(branches=(branch,), stages=stages)
