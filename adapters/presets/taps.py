from pydantic import PositiveInt

from ...routing import OwnScore, Penalty, RouterConfig, Threshold
from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import require_between, scale

_START = 0.15


@register_method("taps", paper="Wallingford et al. 2022, Task Adaptive Parameter Sharing, arXiv:2203.16708")
def taps(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 8,
    threshold: float = 0.1,
    sparsity_loss: float = 1e-3,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One expert per task, and per task and layer a score that says whether the layer is adapted at all.

    A layer is on where its score, which starts at 0.15, is at least `threshold`; `sparsity_loss` on the scores' sizes
    closes the layers a task does not need. Exports exactly.
    """
    require_between("threshold", threshold, 0, _START)  # else other tasks' gates would open, or none at all
    router = RouterConfig(
        scorer=OwnScore(init=_START), normaliser=Threshold(at=threshold), losses=(Penalty(weight=sparsity_loss),)
    )
    bank = Dense(experts=len(tasks), rank=rank)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), router=router, dropout=dropout),))
