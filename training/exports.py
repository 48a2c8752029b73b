"""Taking the tasks of a finished run away as plain PEFT LoRAs, and asking stock PEFT what they can do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters import BaseIdentity, ExportConfig, ExportReport, export_task
from ..adapters.hub import TaskOrBlend
from ..bases import BUNDLED, base_identity
from ..support.console import meter
from ..support.errors import ConfigError, ExportRefused, did_you_mean
from ..tasks import EncodedTask, collate
from .evaluate import Prediction, Scores, evaluate_tasks, questions
from .recipe import EvaluateConfig, public_recipe
from .run import TrainedRun

EXPORTS = "exports"
REFUSED = "refused.json"
_BUNDLED_NOTE = f"`{BUNDLED}` comes with loramux; `loramux base --to FOLDER` writes it out, to be loaded from there."
_CARD_EXAMPLES = 5
_HELD_OUT = 128
_BATCH = 32


def export_run(
    run: TrainedRun,
    tasks: Sequence[EncodedTask],
    folder: Path,
    *,
    base: BaseIdentity,
    only: Sequence[str] | None = None,
    blends: Sequence[Mapping[str, float]] = (),
    allow_lossy: bool = False,
    settings: ExportConfig | None = None,
    scores: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[dict[str, ExportReport], dict[str, str]]:
    """Export tasks of a run, each into `folder/<task>`, and blends of tasks, each into `folder/<task>-<share>-...`.

    Args:
        tasks: all tasks of the run, encoded.
        base: how the adapters name their base.
        only: the tasks to export; None means all.
        blends: shares of tasks that sum to one. What they lose is measured on examples of their tasks, by their shares,
            and by no task's metric.
        allow_lossy: also write exports that lose more than the bound.
        scores: per task named scores for its card, such as `{"base": .1, "matched LoRA": .4}`.

    Returns:
        Reports of what was written, and reasons for what was refused, both by folder.

    Raises:
        ConfigError: for a task the run does not have.
        AdapterError: for shares that are negative or do not sum to one; nothing is written of that blend.
    """
    settings = settings or ExportConfig()
    wanted = [_Wanted(task.name, {task.name: 1.0}, (task,)) for task in _chosen(tasks, only)]
    wanted += [_Wanted(_folder_of(blend), blend, tuple(_chosen(tasks, list(blend)))) for blend in blends]
    reports: dict[str, ExportReport] = {}
    refused: dict[str, str] = {}
    with meter("export", len(wanted)) as progress:
        for one in wanted:
            try:
                reports[one.folder] = export_task(
                    run.model,
                    one.task,
                    folder / one.folder,
                    base=base,
                    calibration=one.batches(run, "train", settings.examples),
                    held_out=one.batches(run, "validation", _HELD_OUT),
                    settings=settings,
                    score=_scorer(run, one.tasks[0]) if len(one.tasks) == 1 else None,
                    allow_lossy=allow_lossy,
                    card=_card(run, one.tasks, base, (scores or {}).get(one.folder, {})),
                )
            except ExportRefused as error:
                refused[one.folder] = str(error)
            progress.advance(note=one.folder)
    return reports, refused


@dataclass(frozen=True)
class _Wanted:
    """A task, or a blend of tasks, that is to leave."""

    folder: str
    shares: Mapping[str, float]
    tasks: tuple[EncodedTask, ...]

    @property
    def task(self) -> TaskOrBlend:
        return self.tasks[0].name if self.shares == {self.tasks[0].name: 1.0} else self.shares

    def batches(self, run: TrainedRun, split: str, limit: int) -> list[dict[str, Tensor]]:
        """Examples of every task, by its share."""
        listed = ((task, max(1, round(limit * self.shares[task.name]))) for task in self.tasks)
        return [batch for task, count in listed for batch in labelled_batches(run, task, split, count)]


def _folder_of(blend: Mapping[str, float]) -> str:
    return "-".join(f"{task}-{share:g}" for task, share in blend.items())


def identity_of(run: TrainedRun, known_as: str | None = None) -> BaseIdentity:
    """How adapters of this run name their base.

    Raises:
        ConfigError: when the base is a folder that nobody else can resolve.
    """
    base = run.recipe.base
    return base_identity(base.model, revision=base.revision, known_as=known_as or base.known_as)


def evaluate_exports(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EncodedTask],
    folder: Path,
    config: EvaluateConfig,
    predictions: list[Prediction] | None = None,
) -> Scores:
    """Score every exported adapter in `folder` on its own task, as stock PEFT loads it.

    Args:
        base: the bare base; it is bare again afterwards.
    """
    scores: Scores = {}
    for task in tasks:
        if (folder / task.name / "adapter_config.json").is_file():
            model = PeftModel.from_pretrained(base, str(folder / task.name)).eval()
            scores |= evaluate_tasks(
                model,
                tokenizer,
                [task],
                split=config.split,
                limit=config.limit,
                batch_size=config.batch_size,
                length_normalised=config.length_normalised,
                predictions=predictions,
                title=f"exported {task.name}",
            )
            model.unload()
    return scores


def _chosen(tasks: Sequence[EncodedTask], only: Sequence[str] | None) -> list[EncodedTask]:
    by_name = {task.name: task for task in tasks}
    for name in only or ():
        if name not in by_name:
            raise ConfigError(f"this run has no task {name!r}; {did_you_mean(name, by_name)}")
    return [by_name[name] for name in only] if only is not None else list(tasks)


def labelled_batches(
    run: TrainedRun, task: EncodedTask, split: str, limit: int | None = None
) -> list[dict[str, Tensor]]:
    """Examples of a task (`input_ids`, `attention_mask`, `labels`): answers are labelled, whatever is trained."""
    rows = [(0, question.encoded) for question in questions(task, split, limit)]
    parts = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    batches = [collate(part, run.tokenizer.pad_token_id or 0) for part in parts]
    device = run.model.device
    keys = ("input_ids", "attention_mask", "labels")
    return [{key: batch[key].to(device) for key in keys} for batch in batches]


def _scorer(run: TrainedRun, task: EncodedTask) -> Callable[[], float] | None:
    """The task's main metric of the model as it runs at the moment; exact exports need no such proof.

    It is of the validation examples: the test split must not decide which exports exist.
    """
    hub: Any = run.model.base_model
    if hub.method().exports_exactly:
        return None
    config = run.recipe.evaluate

    def score() -> float:
        found = evaluate_tasks(
            run.model,
            run.tokenizer,
            [task],
            split="validation",
            limit=config.limit,
            batch_size=config.batch_size,
            length_normalised=config.length_normalised,
            title=None,
            shared=False,  # exports are made by the main process alone
        )
        return found[task.name][task.task.metrics[0]]

    return score


def _card(
    run: TrainedRun, tasks: Sequence[EncodedTask], base: BaseIdentity, scores: Mapping[str, float]
) -> dict[str, Any]:
    shown = [one for task in tasks for one in task.examples[task.split_used("test")][: _CARD_EXAMPLES // len(tasks)]]
    return {
        "description": " ".join(task.task.config.description for task in tasks).strip(),
        "examples": [{"input": example.prompt.strip(), "target": example.target} for example in shown],
        "scores": dict(scores),
        "split": tasks[0].split_used(run.recipe.evaluate.split),
        "base_note": _BUNDLED_NOTE if run.recipe.base.model == BUNDLED else "",
        "recipe": public_recipe(run.recipe, base),
    }
