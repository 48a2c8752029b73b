from pydantic import PositiveInt

from ...routing import LocalBalanceLoss, RouterConfig, Softmax, TokenLinear
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import require_known, scale


@register_method("loramoe", paper="Dou et al. 2023, LoRAMoE, arXiv:2312.09979")
def loramoe(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 6,
    rank: PositiveInt = 4,
    knowledge_tasks: list[str] | None = None,
    balance_loss: float = 0.1,
    delta: float = 0.1,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """LoRA experts mixed per token, one half of them drawn to tasks of world knowledge, the other half to the rest.

    `knowledge_tasks` names the former; without it all experts are of one kind. The paper adapts the feed-forward
    layers alone: set `method.target_modules` to them. The scale is 1 at every rank, so that a rank can be compared
    without its learning rate; the published script's is `alpha=32` at rank 4.
    """
    known = set(knowledge_tasks or ())
    require_known("knowledge_tasks", knowledge_tasks or (), tasks)
    halves = tuple(int(bool(known) and 2 * expert >= experts) for expert in range(experts))
    kinds = tuple(int(bool(known) and task not in known) for task in tasks)
    loss = LocalBalanceLoss(weight=balance_loss, delta=delta, experts=halves, tasks=kinds)
    router = RouterConfig(scorer=TokenLinear(), normaliser=Softmax(), losses=(loss,))
    bank = Dense(experts=experts, rank=rank)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout),))
