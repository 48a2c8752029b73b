"""A new task joins a trained hub, in every way the hub can take it in, beside a plain LoRA trained from scratch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from ..adapters import BaseIdentity, ExportReport, adapted_linears, matched_lora_rank
from ..bases.load import refuse_used_folder
from ..support.console import say
from ..support.errors import AdapterError, ConfigError
from ..tasks import Task, TaskSource, load_tasks
from .adapt_models import Learner, hub_in, join_hub, options_with, plain_lora, with_examples, with_shots
from .adapt_report import MARKDOWN, Adaptation, Outcome, show_adaptation, write_adaptation
from .adapt_training import Material, rate_of, tasks_of, train_way
from .adapt_ways import BASE, SCRATCH, AdaptConfig, Way, choose_ways
from .distributed import make_accelerator
from .evaluate import evaluate_tasks
from .exports import EXPORTS, export_run, identity_of
from .old_tasks import compare_logits, drawn_prompts, logits_of
from .run import TrainedRun, encode_all, load_run
from .run_folder import RunFolder

_OTHERS = {"train": 128, "validation": 16}
"""Examples of each of the other tasks: to tell a router of prompts the difference, and to prove that nothing moved."""


def adapt_run(run_folder: Path, task: TaskSource, folder: Path, settings: AdaptConfig) -> Adaptation:
    """Take a new task into a finished run, on copies of it, and measure every way.

    Args:
        run_folder: a finished run; nothing in it changes.
        task: one task, as `load_tasks` takes it.
        folder: new. Every way leaves a run folder there, with its `mixture` and, where the task leaves it without loss,
            `exports/<task>`.

    Raises:
        ConfigError: not one task, or one the run has; an option that is missing or wrong; a way the hub cannot do;
            `folder` is not empty.
        DataError: the task has fewer training examples than `shots`.
        RunError: `run_folder` is no finished run.
        AdapterError: a task that must not move has moved; the figures are written all the same.
    """
    refuse_used_folder(folder)
    tasks = load_tasks(task)
    if len(tasks) != 1:
        raise ConfigError(f"--task: one task joins at a time, and here are {', '.join(one.name for one in tasks)}")
    run, (new,) = load_run(run_folder), tasks
    if new.name.lower() in [known.name.lower() for known in run.tasks]:
        raise ConfigError(f"--task: {run_folder} has a task {new.name!r}; give the new one another name")
    return _Adapting(run, new, folder, settings).adapt()


class _Adapting:
    """Takes the ways one after the other, each on a fresh copy of the run."""

    def __init__(self, run: TrainedRun, task: Task, folder: Path, settings: AdaptConfig) -> None:
        self.folder, self.settings, self.recipe = folder, settings, run.recipe
        self.accelerator = make_accelerator(replace(run.recipe.train, trackers=()))
        hub = hub_in(run.model.to(self.accelerator.device))
        self.options = options_with(hub, task.name, settings.method_options)
        self.linears = adapted_linears(hub)
        few = [with_examples(known, _OTHERS) for known in run.tasks]
        *others, whole = encode_all([*few, task], run.recipe, run.tokenizer, run.model)
        for note in whole.notes:
            say(f"{task.name}: {note}")
        new = with_shots(whole, settings.shots, settings.seed)
        self.training_examples = len(whole.splits["train"])
        self.material = Material(run.folder.path, run.recipe, run.tasks, others, new, run.tokenizer.pad_token_id or 0)
        self.identity = _identity(run)
        self.before = logits_of(run, others)
        # This copy has been measured; it tells what the method brings a new task, and serves for nothing else.
        brought = hub.add_task(task.name, self.options)
        self.ways, self.left_out = choose_ways(settings.ways, brought, run.recipe.method.name)
        with run.model.disable_adapter():
            self.base = Outcome(BASE, self._score(run, BASE))

    def adapt(self) -> Adaptation:
        """Take every way; write and show what came of them.

        Raises:
            AdapterError: see `adapt_run`.
        """
        outcomes = [self._take(way) for way in self.ways]
        size = max((outcome.parameters for outcome in outcomes), default=0)
        scratch = self._take(SCRATCH, matched_lora_rank(size, self.linears))
        adaptation = Adaptation(self._facts(), [self.base, scratch, *outcomes], self.left_out)
        write_adaptation(self.folder, adaptation)
        show_adaptation(self.folder, adaptation)
        for outcome in outcomes:
            if outcome.broken is not None:
                raise AdapterError(f"{outcome.broken}; see {self.folder / MARKDOWN}")
        return adaptation

    def _take(self, way: Way, rank: int = 0) -> Outcome:
        """Train one way, and measure what lies on the disk afterwards.

        Args:
            rank: of a plain LoRA that starts fresh.
        """
        say(f"{way.name}: {way.says}")
        learner, folder = self._learner(way, rank), RunFolder(self.folder / way.name)
        seconds = train_way(way, learner, self.material, self.settings, folder, self.accelerator)
        adapted = load_run(folder.path, tasks=tasks_of(learner, self.material))
        adapted.model.to(self.accelerator.device)
        scores = self._score(adapted, way)
        outcome = Outcome(
            way,
            scores,
            parameters=learner.trained,
            seconds=seconds,
            learning_rate=rate_of(way, self.recipe, self.settings) if learner.trained else None,
            export=self._export(adapted, way, scores),
        )
        if learner.new is None:
            return outcome
        others = self.material.others
        return replace(
            outcome,
            others=compare_logits(self.before, logits_of(adapted, others)),
            only_to_rounding=learner.new.is_summed_with_others,
            drawn=drawn_prompts(adapted, [*others, self.material.new]),
        )

    def _learner(self, way: Way, rank: int) -> Learner:
        run = load_run(self.material.source, tasks=self.material.known, trainable=True)
        run.model.to(self.accelerator.device)
        set_seed(self.settings.seed)
        if way.adapter == "hub":
            return join_hub(run, way, self.material.new, self.options)
        return plain_lora(run, way, self.material.new.name, rank, self.settings.seed)

    def _score(self, run: TrainedRun, way: Way) -> dict[str, float]:
        """Metrics and loss of the new task, which is named where the model can be told."""
        asked, new = self.recipe.evaluate, self.material.new
        scores = evaluate_tasks(
            run.model,
            run.tokenizer,
            [new],
            split=asked.split,
            limit=asked.limit,
            batch_size=asked.batch_size,
            length_normalised=asked.length_normalised,
            title=way.name,
        )
        return scores[new.name]

    def _export(self, run: TrainedRun, way: Way, scores: dict[str, float]) -> ExportReport | None:
        """Write the new task as a plain LoRA where nothing is lost."""
        if self.identity is None or not hub_in(run.model).method().exports_exactly:
            return None
        new, metric = self.material.new, self.metric
        card = {f"base ({metric})": self.base.scores[metric], f"{way.name} ({metric})": scores[metric]}
        folder = run.folder.path / EXPORTS
        reports, refused = export_run(run, [new], folder, base=self.identity, scores={new.name: card})
        for reason in refused.values():
            say(f"{way.name}: not exported: {reason}")
        return reports.get(new.name)

    @property
    def metric(self) -> str:
        return self.material.new.task.metrics[0]

    def _facts(self) -> dict[str, Any]:
        new = self.material.new
        return {
            "task": new.name,
            "metric": self.metric,
            "split": new.split_used(self.recipe.evaluate.split),
            "run": self.material.source.name,
            "method": self.recipe.method.name,
            "base": self.recipe.base.model if self.identity is None else self.identity.name,
            "shots": len(new.splits["train"]),
            "training_examples": self.training_examples,
            "steps": self.settings.steps,
            "seed": self.settings.seed,
            "examples_of_each_other_task": _OTHERS["validation"],
        }


def _identity(run: TrainedRun) -> BaseIdentity | None:
    """How exports name their base; None, and said, where nobody else could resolve it."""
    try:
        return identity_of(run)
    except ConfigError as error:
        say(f"no exports: {error}")
        return None
