from pydantic import PositiveInt

from ..branch import BranchConfig
from ..cores import InnerMix
from ..generated import Template
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale, to_own_expert


@register_method("polyhistor", paper="Liu et al. 2022, Polyhistor, arXiv:2210.03265")
def polyhistor(
    tasks: TaskNames,
    *,
    rank: PositiveInt = 8,
    template_rank: PositiveInt = 2,
    template_width: PositiveInt = 64,
    code: PositiveInt = 64,
    hidden: PositiveInt = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One small template per task, made by a hypernetwork of low rank and stretched to every layer.

    A layer's scaling kernels, which all tasks share, turn the templates of A and B into factors by Kronecker products.
    Blends of tasks blend their codes. Exports exactly, at rank `rank`.
    """
    bank = Template(
        experts=len(tasks),
        rank=rank,
        template_rank=template_rank,
        template_width=template_width,
        code=code,
        hidden=hidden,
    )
    branch = BranchConfig(
        bank=bank,
        core=InnerMix(),
        scaling=scale(alpha, rank),
        router=to_own_expert(tasks, shared=True),
        dropout=dropout,
    )
    return MethodConfig(branches=(branch,))
