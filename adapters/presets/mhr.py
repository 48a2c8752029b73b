from pydantic import PositiveInt

from ...routing import RouterConfig, SigmoidShare, TaskTable
from ..banks import Dense
from ..branch import BranchConfig
from ..cores import FactorMix
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("mhr", paper="Caccia et al. 2023, Multi-Head Routing, arXiv:2211.03831")
def mhr(
    tasks: TaskNames,
    *,
    skills: PositiveInt = 8,
    rank: PositiveInt = 1,
    splits: PositiveInt = 8,
    sampled: bool = False,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """Poly, finer: every one of `splits` blocks of a factor is averaged over the skills with weights of its own.

    `splits` must divide the sizes of all adapted linears (the paper's 64 does on T5-XL; grouped-query models want
    fewer). The scores learn 50 times as fast as the skills (the paper: 100 times). Exports exactly at rank `rank`.
    """
    router = RouterConfig(scorer=TaskTable(init_std=1e-3), normaliser=SigmoidShare(sampled=sampled), groups=splits)
    branch = BranchConfig(
        bank=Dense(experts=skills, rank=rank),
        core=FactorMix(splits=splits),
        scaling=scale(alpha, rank),
        router=router,
        dropout=dropout,
    )
    return MethodConfig(branches=(branch,), task_logit_rate=50.0)
