"""Export: one task leaves the hub as a plain PEFT LoRA folder, measured against the routed model it came from."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..support.config import config
from ..support.errors import ExportRefused
from ..support.files import atomic_folder, write_json
from ..support.identity import BaseIdentity
from .blocks import base_name
from .card import write_card
from .fidelity import Fidelity, measure_fidelity
from .fit import distil, fit_factors
from .hub import LoramuxModel, TaskOrBlend
from .low_rank import LowRank, to_one_rank_class

WEIGHTS = "adapter_model.safetensors"
REPORT = "export.json"
Batch = Mapping[str, Tensor]


@config
class ExportConfig:
    """How token-routed adapters are fitted, and what an export may lose.

    Attributes:
        max_kl: largest mean divergence (nats per answer token) from the routed model.
        max_metric_drop: largest loss of the task's metric, as a fraction (0.005 is half a point).
        max_logit_difference: largest logit difference of an exact export in float32.
        rank: rank of fitted exports; None takes the class that holds all experts of a layer.
        distil_steps: steps of distillation after the least-squares fit, taken when the fit alone is over `max_kl`.
        examples: training examples a fit sees, at most.
    """

    max_kl: float = 0.02
    max_metric_drop: float = 0.005
    max_logit_difference: float = 1e-4
    rank: int | None = None
    distil_steps: int = 60
    examples: int = 512


@dataclass(frozen=True)
class ExportReport:
    """What was exported and what it lost.

    Attributes:
        how: `exact`, `least squares` or `least squares + distillation`.
        routed_score, exported_score: the task's metric before and after, where it was measured.
    """

    task: str
    method: str
    how: str
    rank: int
    fidelity: Fidelity
    routed_score: float | None = None
    exported_score: float | None = None
    faults: list[str] = field(default_factory=list)

    def to_data(self) -> dict[str, Any]:
        return {**self.__dict__, "fidelity": self.fidelity.to_data()}


def export_task(
    model: PeftModel,
    task: TaskOrBlend,
    folder: Path,
    *,
    base: BaseIdentity,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    settings: ExportConfig | None = None,
    score: Callable[[], float] | None = None,
    allow_lossy: bool = False,
    card: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write `folder` as a stock PEFT LoRA of one task, or of a blend of tasks (a preference).

    Exact where the method's weights are constant over the task's tokens, else fitted on `calibration`.

    Args:
        model: the routed PEFT model; put in evaluation mode.
        calibration: training batches of the task (`input_ids`, `attention_mask`, `labels`); unused by exact exports.
        held_out: other batches of the task, on which the loss is measured.
        score: the task's metric of `model` as it now runs (called once routed, once with the exported factors).
        allow_lossy: write the export even when it is over a bound; the card says so.
        card: more facts for the model card (description, examples, recipe, scores).

    Raises:
        ExportRefused: when the export is over a bound and `allow_lossy` is not set; nothing is written.
    """
    settings = settings or ExportConfig()
    _check_identity(base)
    hub: LoramuxModel = model.base_model  # type: ignore[assignment]
    if hub.peft_config[hub.active_adapters[0]].modules_to_save:
        raise ExportRefused("the adapter also trained modules_to_save, which a plain LoRA does not hold")
    model.eval()
    how, factors, fidelity = _best_factors(hub, task, calibration, held_out, settings)
    report = _report(hub, task, how, factors, fidelity, score, settings)
    if report.faults and not allow_lossy:
        raise ExportRefused(
            f"task {_named(task)!r}: " + "; ".join(report.faults) + ". Use --allow-lossy to export it all the same"
        )
    with atomic_folder(folder) as staging:
        task_type = hub.peft_config[hub.active_adapters[0]].task_type
        targets = short_names(hub.layers(), hub.model)
        save_lora(staging, factors, base=base, target_modules=targets, task_type=task_type)
        write_json(staging / REPORT, {**report.to_data(), "card": dict(card or {})})
        write_card(staging, report.to_data(), base.name, base.revision, card or {})
    return report


@torch.no_grad()
def exact_factors(hub: LoramuxModel, task: TaskOrBlend | None) -> dict[str, LowRank]:
    """The plain LoRA of every layer under one task, or under a blend of tasks `{name: share}`.

    Experts with weight zero take no rank.

    Raises:
        AdapterError: when the method routes by token, or `task` is needed and None.
    """
    adapter = hub.active_adapters[0]
    layers = {name: layer for name, layer in hub.layers().items() if layer.branches(adapter)}
    with hub.routing(task) if task is not None else nullcontext():
        pairs = {name: layer.factors(adapter) for name, layer in layers.items()}
    return {name: LowRank(pair.down.float(), pair.up.float()).without_zeros() for name, pair in pairs.items()}


def save_lora(
    folder: Path,
    factors: dict[str, LowRank],
    *,
    base: BaseIdentity,
    target_modules: list[str] | None = None,
    task_type: Any = None,
) -> None:
    """Write a PEFT LoRA folder: scale one, one rank class for all layers; then reopen it and compare.

    `target_modules` defaults to the full names of the layers.
    """
    uniform = to_one_rank_class(factors)
    rank = next(iter(uniform.values())).rank
    tensors = {}
    for name, pair in uniform.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = pair.down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pair.up.contiguous()
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules or sorted(uniform),
        task_type=task_type,
        base_model_name_or_path=base.name,
        revision=base.revision,
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    verify_tensors(folder / WEIGHTS, tensors)


def short_names(adapted: Collection[str], model: nn.Module) -> list[str]:
    """Short names, which every server reads, where they name the adapted layers and no others; else full names."""
    short = {name.rpartition(".")[2] for name in adapted}
    named = {base_name(name) for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if named == set(adapted) else adapted)


def verify_tensors(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Reopen a saved file and compare names and shapes with what should be in it.

    Raises:
        ExportRefused: when a tensor is missing, unexpected or of another shape.
    """
    with safe_open(path, "pt") as saved:
        found = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if found != wanted:
        wrong = sorted(set(found.items()) ^ set(wanted.items()))[0][0]
        raise ExportRefused(f"{path.name} does not hold what was saved: tensor {wrong} is missing or differs")


def _best_factors(
    hub: LoramuxModel,
    task: TaskOrBlend,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    settings: ExportConfig,
) -> tuple[str, dict[str, LowRank], Fidelity]:
    if hub.method().exports_exactly:
        factors = to_one_rank_class(exact_factors(hub, task if hub.tasks else None))
        return "exact", factors, measure_fidelity(hub, task, factors, held_out)
    how, factors = "least squares", to_one_rank_class(fit_factors(hub, task, calibration, settings.rank))
    fidelity = measure_fidelity(hub, task, factors, held_out)
    if fidelity.token_kl > settings.max_kl and settings.distil_steps:
        moved = distil(hub, task, calibration, factors, steps=settings.distil_steps)
        after = measure_fidelity(hub, task, moved, held_out)
        if after.token_kl < fidelity.token_kl:
            how, factors, fidelity = "least squares + distillation", moved, after
    return how, factors, fidelity


def _report(
    hub: LoramuxModel,
    task: TaskOrBlend,
    how: str,
    factors: dict[str, LowRank],
    fidelity: Fidelity,
    score: Callable[[], float] | None,
    settings: ExportConfig,
) -> ExportReport:
    routed = exported = None
    if score is not None:
        with hub.routing(task):
            routed = score()
        with hub.using_factors(factors):
            exported = score()
    rank = next(iter(factors.values())).rank
    method = hub.peft_config[hub.active_adapters[0]].method
    faults = _faults(how, fidelity, routed, exported, settings)
    return ExportReport(_named(task), method, how, rank, fidelity, routed, exported, faults)


def _named(task: TaskOrBlend) -> str:
    return task if isinstance(task, str) else " + ".join(f"{share:g} {name}" for name, share in task.items())


def _faults(
    how: str, fidelity: Fidelity, routed: float | None, exported: float | None, settings: ExportConfig
) -> list[str]:
    faults = []
    if how == "exact" and fidelity.max_logit_difference > settings.max_logit_difference:
        faults.append(
            f"logits differ by {fidelity.max_logit_difference:.2e}, "
            f"over the bound of {settings.max_logit_difference:.0e}"
        )
    if fidelity.token_kl > settings.max_kl:
        faults.append(f"divergence {fidelity.token_kl:.4f} nats per token is over the bound of {settings.max_kl}")
    if routed is not None and exported is not None and routed - exported > settings.max_metric_drop:
        faults.append(f"the metric falls from {routed:.3f} to {exported:.3f}, more than {settings.max_metric_drop}")
    return faults


def _check_identity(base: BaseIdentity) -> None:
    path = Path(base.name)
    if path.is_absolute() or base.name.startswith((".", "~")) or len(path.parts) > 2:
        raise ExportRefused(
            f"{base.name!r} is a path of this machine, which nobody else can resolve: give the base's Hub id "
            "(--base-id ORG/NAME)"
        )
