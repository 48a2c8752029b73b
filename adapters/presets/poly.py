from pydantic import PositiveInt

from ...routing import RouterConfig, SigmoidShare, TaskTable
from ..banks import Dense
from ..branch import BranchConfig
from ..cores import FactorMix
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("poly", paper="Ponti et al. 2023, Polytropon, arXiv:2202.13914")
def poly(
    tasks: TaskNames,
    *,
    skills: PositiveInt = 4,
    rank: PositiveInt = 16,
    sampled: bool = True,
    alpha: float = 1.0,
    dropout: float = 0.0,
) -> MethodConfig:
    """A few skills shared by all tasks: each task averages the factors of the skills it has.

    Whether a task has a skill is drawn from a relaxed Bernoulli distribution in training (`sampled`) and is its mean
    in evaluation. The scores learn 50 times as fast as the skills (the paper: 10 to 100 times;
    `train.task_logit_learning_rate` is a rate of your own). Exports exactly at rank `rank`.
    """
    router = RouterConfig(scorer=TaskTable(init_std=1e-3), normaliser=SigmoidShare(sampled=sampled))
    branch = BranchConfig(
        bank=Dense(experts=skills, rank=rank),
        core=FactorMix(),
        scaling=scale(alpha, rank),
        router=router,
        dropout=dropout,
    )
    return MethodConfig(branches=(branch,), task_logit_rate=50.0)
