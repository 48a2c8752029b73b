"""Training one way for a new task to join: its recipe, its batches, its run folder."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from accelerate import Accelerator

from ..support.config import to_data
from ..tasks import EncodedTask, Mixture, MixtureConfig, Task
from .adapt_models import Learner, hub_in
from .adapt_ways import EVERY_WAY, AdaptConfig, Way
from .batches import MixtureBatches
from .loop import Trainer
from .recipe import BaselineConfig, Recipe, TrainConfig
from .run_folder import RunFolder, base_fingerprint
from .state import adapter_weights


@dataclass(frozen=True)
class Material:
    """What all ways are trained on.

    Attributes:
        source: the folder of the run that the task joins, and `recipe` its recipe.
        known: the tasks of that run as it has them.
        others: some encoded examples of them.
        new: the task that joins, with the examples it may learn from.
        pad_id: token id of padding.
    """

    source: Path
    recipe: Recipe
    known: list[Task]
    others: list[EncodedTask]
    new: EncodedTask
    pad_id: int

    @property
    def batch_size(self) -> int:
        """Of batches of the new task alone."""
        return min(self.recipe.train.batch_size, len(self.new.splits["train"]))


def rate_of(way: Way, recipe: Recipe, settings: AdaptConfig) -> float:
    """The peak learning rate of a way."""
    own = recipe.baseline_rate if way.adapter == "lora" else recipe.train.learning_rate
    given = settings.learning_rates
    return given.get(way.name, given.get(EVERY_WAY, way.rate * own))


def train_way(
    way: Way, learner: Learner, material: Material, settings: AdaptConfig, folder: RunFolder, accelerator: Accelerator
) -> float:
    """Train a learner and leave it in a run folder of its own.

    Returns:
        The seconds that training took.

    Raises:
        TrainingDiverged, RunError: as `Trainer.train`.
    """
    lesson = _Lesson(way, learner, material, settings)
    batches, recipe = lesson.batches(), lesson.recipe
    folder.open(recipe, resume=False)
    folder.note_environment(base_fingerprint(learner.model.get_base_model()), recipe, batches)
    started = time.monotonic()
    if learner.trained:
        Trainer(learner.model, batches, recipe.train, accelerator, folder, stages=lesson.stages).train()
    else:
        prompts = [batch.to(accelerator.device).inputs for batch in batches.samples(len(material.new.splits["train"]))]
        hub_in(learner.model).finish_stage(lesson.stages[-1], lambda: prompts)
    seconds = time.monotonic() - started
    folder.write_mixture(learner.model, adapter_weights(learner.model))
    shutil.rmtree(folder.checkpoints, ignore_errors=True)  # the last one: it is what the mixture holds
    accelerator.free_memory()
    return seconds


class _Lesson:
    """The recipe and the batches of one way."""

    def __init__(self, way: Way, learner: Learner, material: Material, settings: AdaptConfig) -> None:
        self.way, self.learner, self.material, self.settings = way, learner, material, settings
        self.stages = way.stages(learner.new)
        # Where a router of prompts must tell the task from the others, it sees prompts of all in its own stage.
        self.teaches_a_router = len(self.stages) > 1

    @cached_property
    def recipe(self) -> Recipe:
        return replace(
            self.material.recipe,
            tasks=[to_data(task.config) for task in tasks_of(self.learner, self.material)],
            mixture=MixtureConfig(strategy="weights", weights=self._shares()),
            method=self.learner.method,
            train=self._training(),
            baseline=BaselineConfig(enabled=False),
        )

    def batches(self) -> MixtureBatches:
        new, config = self.material.new, self.recipe.train
        tasks: Sequence[EncodedTask] = [*self.material.others, new] if self.learner.new else [new]
        lengths = {task.name: task.lengths for task in tasks}
        alone = Mixture({new.name: new.lengths}, batch_size=self.material.batch_size, seed=config.seed)
        return MixtureBatches(
            tasks,
            Mixture(lengths, self.recipe.mixture, batch_size=config.batch_size, seed=config.seed),
            pad_id=self.material.pad_id,
            parts=config.accumulation,
            only=(alone, [len(tasks) - 1]),
        )

    def _shares(self) -> dict[str, float]:
        share = 1 / len(self.material.known) if self.teaches_a_router else 0.0
        others = [task.name for task in self.material.known] if self.learner.new else []
        return {**dict.fromkeys(others, share), self.material.new.name: 1.0}

    def _training(self) -> TrainConfig:
        own, steps = self.material.recipe.train, self.settings.steps
        rate = rate_of(self.way, self.material.recipe, self.settings)
        return replace(
            own,
            steps=steps,
            batch_size=own.batch_size if self.teaches_a_router else self.material.batch_size,
            accumulation=min(own.accumulation, self.material.batch_size),
            learning_rate=rate,
            router_learning_rate=rate * self.way.row_rate,
            task_logit_learning_rate=rate * self.way.row_rate,
            save_every=steps,
            keep_checkpoints=1,
            trackers=(),
            seed=self.settings.seed,
            start_from=str(self.material.source.absolute()) if self.learner.new else None,
            only_tasks=None,
        )


def tasks_of(learner: Learner, material: Material) -> list[Task]:
    """The tasks that a learner serves, in its order."""
    return [*material.known, material.new.task] if learner.new else [material.new.task]
