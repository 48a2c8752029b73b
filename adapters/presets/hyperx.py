from pydantic import PositiveInt

from ..branch import BranchConfig
from ..cores import InnerMix
from ..generated import Hyper
from ..registry import MethodConfig, TaskNames, register_method
from ._options import numbered, scale, to_own_expert


@register_method("hyperx", paper="Ustun et al. 2022, Hyper-X, arXiv:2205.12148")
def hyperx(
    tasks: TaskNames,
    *,
    kinds: dict[str, str] | None = None,
    languages: dict[str, str] | None = None,
    rank: PositiveInt = 8,
    code: PositiveInt = 64,
    source: PositiveInt = 192,
    magnitude_invariant: bool = False,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> MethodConfig:
    """One hypernetwork makes the LoRA of every layer from the codes of a task, a language and the layer.

    `languages` names the language of every task. Where several tasks are one task in different languages, `kinds` names
    that task; a pair that is never trained is then a task like any other, which its task and its language make between
    them. Blends of tasks blend their codes. The paper's bottleneck has a ReLU between its factors, goes with
    generated layer norms and starts smaller; this is its low-rank form, for LoRA's learning rates. Exports exactly, at
    rank `rank`.

    `magnitude_invariant` keeps the size of the codes constant and adds what they make to a LoRA of each layer that all
    tasks share (Ortiz et al. 2023, arXiv:2304.07645).
    """
    bank = Hyper(
        tasks=numbered("kinds", kinds or {task: task for task in tasks}, tasks),
        languages=numbered("languages", languages or dict.fromkeys(tasks, "one"), tasks),
        rank=rank,
        code=code,
        source=source,
        magnitude_invariant=magnitude_invariant,
    )
    branch = BranchConfig(
        bank=bank,
        core=InnerMix(),
        scaling=scale(alpha, rank),
        router=to_own_expert(tasks, shared=True),
        dropout=dropout,
    )
    return MethodConfig(branches=(branch,))
