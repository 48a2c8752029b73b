from pydantic import PositiveInt

from ...routing import Constant, RandomOne, RouterConfig
from ..banks import Dense
from ..branch import BranchConfig
from ..cores import OutputMix
from ..registry import MethodConfig, StageConfig, TaskNames, register_method
from ._options import scale


@register_method("mosa", paper="Zhang et al. 2023, MoSA: Mixture of sparse adapters, arXiv:2312.02923")
def mosa(
    tasks: TaskNames,
    *,
    modules: PositiveInt = 4,
    rank: PositiveInt = 64,
    consistency: float = 1.0,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One LoRA in `modules` blocks of ranks, one of which, at random, acts in each training step; all act in the end.

    In training a block acts `modules` times as strongly, so that all together say in the end what each has learnt to
    say alone; the authors' code adds them up as they are. Each step makes two passes, with different blocks, and
    `consistency` weights the divergence of their answers. Exports exactly at rank `rank`.
    """
    if rank % modules:
        raise ValueError(f"modules (={modules}) must divide rank (={rank})")
    branch = BranchConfig(
        bank=Dense(rank=rank),
        core=OutputMix(block_size=rank // modules),
        scaling=scale(alpha, rank),
        router=RouterConfig(scorer=Constant(), normaliser=RandomOne()),
        dropout=dropout,
    )
    return MethodConfig(branches=(branch,), stages=(StageConfig(consistency=consistency),))
