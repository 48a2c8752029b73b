from typing import Literal

from pydantic import PositiveInt

from ...routing import RouterConfig, Softmax, TaskTable
from ..banks import Dense
from ..branch import BranchConfig
from ..cores import HeadMix
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("mtl_lora", paper="Yang et al. 2024, MTL-LoRA, arXiv:2410.09437")
def mtl_lora(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 3,
    rank: PositiveInt = 8,
    core: Literal["full", "diagonal"] = "full",
    temperature: float = 0.1,
    alpha: float | None = None,
    dropout: float = 0.05,
) -> MethodConfig:
    """A shared A, a matrix per task at rank `rank`, and B heads mixed by a sharp softmax over the task's own scores.

    Exports exactly at rank `rank`, with the same A for all tasks: the cheapest exact export of the family. `core` is
    the task matrix as the published code has it (`full`) or as the paper's revision says (`diagonal`). The scale is 1
    at every rank, so that a rank can be compared without its learning rate; the paper's is `alpha=16` at rank 8.
    """
    # The scores' noise is what tells the heads apart: they all start at zero.
    router = RouterConfig(scorer=TaskTable(init_std=0.33), normaliser=Softmax(temperature=temperature))
    branch = BranchConfig(
        bank=Dense(experts=experts, rank=rank, shared_down=True),
        core=HeadMix(task_matrix=core),
        scaling=scale(alpha, rank),
        router=router,
        dropout=dropout,
    )
    return MethodConfig(branches=(branch,))
