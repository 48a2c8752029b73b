from pydantic import PositiveInt

from ..banks import Dense
from ..branch import BranchConfig
from ..registry import MethodConfig, TaskNames, register_method
from ._options import scale


@register_method("multilora", paper="Wang et al. 2023, MultiLoRA, arXiv:2311.11501")
def multilora(
    tasks: TaskNames,
    *,
    experts: PositiveInt = 3,
    rank: PositiveInt = 32,
    alpha: float | None = None,
    dropout: float = 0.05,
) -> MethodConfig:
    """Parallel LoRAs that are all on, each with a trainable scale per output unit that starts at zero.

    Exports as one LoRA of rank `experts * rank`. The scales start at zero, so the first steps move nothing else: give
    it warm-up or a higher learning rate than plain LoRA.
    """
    bank = Dense(experts=experts, rank=rank, output_scale=True)
    return MethodConfig(branches=(BranchConfig(bank=bank, scaling=scale(alpha, rank), dropout=dropout),))
