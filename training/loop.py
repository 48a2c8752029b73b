"""The training loop: stages of steps over the global batches of a mixture, on one or many processes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from ..adapters import StageConfig
from ..support.console import Meter, meter, say
from ..support.errors import ConfigError, RunError, TrainingDiverged
from .answer_logits import Losses, Objective, sum_by_task, task_weights
from .batches import MicroBatch, MixtureBatches
from .checkpoint import Checkpoint, CheckpointFolder, DamagedCheckpoint, read_checkpoint
from .distributed import all_listed, all_sum, from_main, gradients_kept_local, shard
from .gradients import task_gradient_cosines
from .optimizer import build_optimizer, clip_gradients, schedule_factor, set_learning_rates
from .progress import Progress
from .recipe import TrainConfig
from .route_log import RouteLog, warn_of_collapse
from .run_folder import RunFolder
from .schedule import StageSpan, draw_preferences, stage_spans
from .state import adapter_weights, load_adapter_state, load_optimizer_state, optimizer_state, peft_names

Evaluate = Callable[[nn.Module, int], Mapping[str, float]]
SCORE = "metric"
"""The key of an evaluation's result that picks the best checkpoint: the mean validation metric over tasks."""
_MOST_NAMED = 8
PROTOTYPE_EXAMPLES = 128
"""Training examples per task that prototypes are fitted on."""


class Trainer:
    """Trains the adapters of a model; `train` leaves the best weights in it.

    Args:
        model: a PEFT model whose tuner is a loramux hub.
        batches: this process's share of the mixture.
        config: the recipe's `train` section.
        accelerator: from `make_accelerator`.
        folder: where metrics and checkpoints go.
        evaluate: called with the model and the step on every process; its result is logged under `eval/`, and its
            `metric` picks the best checkpoint of the last stage.
        stages: how it is trained; None: as the method says. Those that train nothing take no steps.
    """

    def __init__(
        self,
        model: Any,
        batches: MixtureBatches,
        config: TrainConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        evaluate: Evaluate | None = None,
        stages: Sequence[StageConfig] | None = None,
    ) -> None:
        self.model, self.hub, self.batches, self.config = model, model.base_model, batches, config
        self.accelerator, self.folder, self.evaluate = accelerator, folder, evaluate
        self.checkpoints = CheckpointFolder(folder.checkpoints, config.keep_checkpoints)
        self.spans = stage_spans(stages or self.hub.stages, config.steps)
        self.progress = Progress()
        self.last: dict[str, float] = {}
        self.routes = RouteLog(self.hub, config, accelerator)
        self._resumed_optimizer: dict[str, Tensor] | None = None

    def train(self) -> None:
        """Run all stages from where the newest whole checkpoint stands.

        Raises:
            TrainingDiverged: the loss or a gradient is not finite; the message names step, tasks and examples.
            RunError: a checkpoint cannot be written, or none of those there can be read.
        """
        self._resume()
        self._place()
        with meter("training", self.spans[-1].stop, self.progress.step) as shown:
            for span in self.spans:
                if self.progress.step < span.stop and not self.progress.stopped:
                    self._train_stage(span, shown)
                if self.progress.step == span.stop and span is not self.spans[-1]:
                    self._finish_stage(span)  # also where a run goes on from the last checkpoint of a stage
        self._take_best()
        self._finish_stage(self.spans[-1])

    # ------------------------------------------------------------------ stages and steps

    def _train_stage(self, span: StageSpan, shown: Meter) -> None:
        self.hub.set_stage(span.stage)
        objective = self.objective = Objective(self.model, self.hub)
        groups = self.hub.parameter_groups()
        self.experts_only = not (groups["router"] or groups["task_logits"])
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(groups, self.config, self.hub.method()))
        if self._resumed_optimizer is not None and span.holds(self.progress.step):
            load_optimizer_state(self.optimizer, self._resumed_optimizer)
        self._resumed_optimizer = None
        self.wrapped = objective if self.is_sharded else self.accelerator.prepare_model(objective)
        self.model.train()
        while self.progress.step < span.stop and not self.progress.stopped:
            self._train_step(span)
            self._after_step(span, shown)
        objective.release()
        self.wrapped = None
        if span is not self.spans[-1]:
            self.accelerator.free_memory()  # a DDP wrapper left alive would reduce gradients a second time

    def _finish_stage(self, span: StageSpan) -> None:
        set_seed(_step_seed(self.config.seed, span.stop, 0))
        self.hub.finish_stage(span.stage, self._prompts)

    def _prompts(self) -> Iterator[dict[str, Tensor]]:
        """Examples of every task, the same on every process."""
        for batch in self.batches.samples(PROTOTYPE_EXAMPLES):
            yield batch.to(self.accelerator.device).inputs

    def _train_step(self, span: StageSpan) -> None:
        step = self.progress.step
        # Every draw depends on seed, step and process alone, so a resumed run draws what an undisturbed one would.
        set_seed(_step_seed(self.config.seed, step, self.accelerator.process_index))
        set_learning_rates(self.optimizer, schedule_factor(step - span.start, span.length, self.config))
        micro_batches = self.batches.at(step, experts_only=self.experts_only)
        counts = all_sum(torch.stack([b.token_counts for b in micro_batches]).sum(0), self.accelerator)
        weights = task_weights(counts, span.stage.reduction)
        blend = None
        if span.stage.preferences is not None:
            blend = draw_preferences(len(counts), span, step, self.config.seed)
            weights, micro_batches = weights * blend * len(blend), [b.blended(blend) for b in micro_batches]
        if self.config.log_gradients is not None and (step + 1) % self.config.log_gradients == 0:
            self._log_gradients(blend)
        losses = [self._backward(b, weights, local=b is not micro_batches[-1]) for b in micro_batches]
        self._note_losses(micro_batches, losses, counts)
        self._clip(span, micro_batches)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.hub.finish_step()
        self.progress.step += 1

    def _backward(self, batch: MicroBatch, weights: Tensor, *, local: bool) -> Losses:
        """Add the gradient of one micro-batch; DDP and FSDP average over processes, so sums are scaled up here."""
        processes = self.accelerator.num_processes
        token_weights = weights[batch.tasks[batch.answers.rows]] * processes
        batch = batch.to(self.accelerator.device)
        with gradients_kept_local(self.wrapped, self.model, local):
            with self.accelerator.autocast(), self.routes.counting(self.progress.step + 1):
                losses = self.wrapped(
                    batch.inputs,
                    batch.labels,
                    batch.answers,
                    token_weights.to(self.accelerator.device),
                    batch.share * processes,
                )
            self.accelerator.backward(losses.total)
        return losses

    def _note_losses(self, micro_batches: list[MicroBatch], losses: list[Losses], counts: Tensor) -> None:
        """Check that losses are finite and add them, summed over processes, to what the next log line tells."""
        rows = torch.cat([loss.row_sums for loss in losses]).double().cpu()
        auxiliary = float(sum(b.share * loss.auxiliary for b, loss in zip(micro_batches, losses, strict=True)))
        tasks = torch.cat([batch.tasks for batch in micro_batches])
        totals = torch.cat([sum_by_task(rows, tasks, len(counts)), torch.tensor([auxiliary], dtype=torch.float64)])
        totals = all_sum(totals, self.accelerator)
        if not bool(torch.isfinite(totals).all()):
            named = [row for batch in micro_batches for row in batch.rows]
            bad = [row for row, value in zip(named, rows.isfinite().tolist(), strict=True) if not value]
            self._stop_diverged("loss", bad if bool(totals[-1].isfinite()) else named)
        self.progress.add(totals[:-1], counts)
        self.last["train/auxiliary_loss"] = float(totals[-1])

    def _log_gradients(self, blend: Tensor | None) -> None:
        """Log how well the gradients of the tasks agree before the step that is about to be made.

        They are taken on examples of every task: a batch of examples alike in length has only some of the tasks.
        """
        drawn = self.batches.of_each_task(self.progress.step)
        batches = ((task, batch if blend is None else batch.blended(blend)) for task, batch in drawn)
        found = task_gradient_cosines(self.objective, self.hub, batches, self.accelerator)
        pairs = found[torch.triu(torch.ones_like(found), diagonal=1) > 0]
        cosines = [[value if math.isfinite(value) else None for value in row] for row in found.tolist()]
        if self.accelerator.is_main_process:
            self.folder.log_gradients(self.progress.step + 1, self.batches.names, cosines)
        if bool(pairs.isfinite().any()):
            self._log({"gradients/cosine": float(pairs.nanmean())}, step=self.progress.step + 1)

    def _clip(self, span: StageSpan, micro_batches: list[MicroBatch]) -> None:
        self.accelerator.unscale_gradients(self.optimizer)
        norm = clip_gradients(self.optimizer, self.config.clip, len(self.hub.tasks), span.stage.reduction)
        if not norm < float("inf") and self.accelerator.scaler is None:  # a loss scaler skips such steps by itself
            self._stop_diverged("gradient", [row for batch in micro_batches for row in batch.rows])
        self.last["train/gradient_norm"] = norm

    def _stop_diverged(self, what: str, rows: list[tuple[int, int]]) -> None:
        names = self.batches.names
        bad = sorted(set(all_listed(rows)))
        tasks = ", ".join(repr(names[task]) for task in sorted({task for task, _ in bad}))
        examples = ", ".join(f"{names[task]}[{example}]" for task, example in bad[:_MOST_NAMED])
        more = f" and {len(bad) - _MOST_NAMED} more" if len(bad) > _MOST_NAMED else ""
        steps = self.checkpoints.steps()
        kept = (
            f"the last good checkpoint is {self.checkpoints.at(steps[-1])}" if steps else "there is no checkpoint yet"
        )
        raise TrainingDiverged(
            f"the {what} is not finite at step {self.progress.step + 1} (task {tasks}; training examples "
            f"{examples}{more}); {kept}. Lower train.learning_rate or look at these examples, then resume"
        )

    # ------------------------------------------------------------------ what happens between steps

    def _after_step(self, span: StageSpan, shown: Meter) -> None:
        step, ends = self.progress.step, self.progress.step == self.config.steps
        if step % self.config.log_every == 0 or ends:
            self._log_training(span)
        evaluates = self.evaluate is not None and (step % self._every(self.config.eval_every) == 0 or ends)
        improved = evaluates and self._evaluate(counts=span is self.spans[-1])
        if improved or ends or self.progress.stopped or step % self._every(self.config.save_every) == 0:
            self._save()
        loss = f"loss {self.last['train/loss']:.3f}  " if "train/loss" in self.last else ""
        shown.advance(note=loss + span.stage.name)

    def _every(self, steps: int | None) -> int:
        return steps or max(self.config.steps // 4, 1)

    def _log_training(self, span: StageSpan) -> None:
        self.last |= self.progress.take_losses(self.batches.names)
        self.last["train/learning_rate"] = max(group["lr"] for group in self.optimizer.param_groups)
        self.last["train/answer_tokens"] = self.progress.answer_tokens
        routing, labels = self.routes.take(self.progress)
        self._log(self.last | routing, {"stage": span.stage.name, **labels})
        if warning := warn_of_collapse(self.hub, self.progress, self.config):
            say(warning)

    def _evaluate(self, *, counts: bool) -> bool:
        """Measure the model; True when its score is the best so far.

        Args:
            counts: whether this is the last stage; models of earlier ones lack parts, and are not candidates.
        """
        assert self.evaluate is not None
        self.model.eval()
        result = from_main(dict(self.evaluate(self.model, self.progress.step)))
        self.model.train()
        self._log({f"eval/{name}": float(value) for name, value in result.items()})
        score = result.get(SCORE)
        return counts and score is not None and self.progress.consider(float(score), self.config.early_stop)

    def _log(
        self, values: Mapping[str, float], labels: Mapping[str, str] | None = None, *, step: int | None = None
    ) -> None:
        step = self.progress.step if step is None else step
        if self.accelerator.is_main_process:
            self.folder.log(step, values, **labels or {})
        self.accelerator.log(dict(values), step=step)

    # ------------------------------------------------------------------ saving and resuming

    def _save(self) -> None:
        self.routes.fold(self.progress)
        adapter = peft_names(self.model, adapter_weights(self.model))
        scaler = {"scaler": self.accelerator.scaler.state_dict()} if self.accelerator.scaler else {}
        checkpoint = Checkpoint(adapter, optimizer_state(self.optimizer), asdict(self.progress) | scaler)
        for name, tensor in checkpoint.adapter.items():
            if not bool(torch.isfinite(tensor).all()):
                raise TrainingDiverged(
                    f"{name} is not finite after step {self.progress.step}; this state is not saved, and earlier "
                    "checkpoints are kept. Lower train.learning_rate, then resume"
                )
        failure = None
        if self.accelerator.is_main_process:
            try:
                self.checkpoints.write(checkpoint)
            except RunError as error:
                failure = str(error)
        if failure := from_main(failure):
            raise RunError(failure)

    def _resume(self) -> None:
        checkpoint = self.checkpoints.read_latest()
        if checkpoint is not None:
            load_adapter_state(self.model, checkpoint.adapter, str(self.checkpoints.at(checkpoint.state["step"])))
            self._resumed_optimizer = checkpoint.optimizer
            known = {name: checkpoint.state[name] for name in asdict(self.progress) if name in checkpoint.state}
            self.progress = Progress(**known)
            if self.accelerator.scaler and "scaler" in checkpoint.state:
                self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.checkpoints.drop_after(self.progress.step)
            self.folder.cut_logs(self.progress.step)

    def _place(self) -> None:
        self.is_sharded = self.config.distributed == "fsdp" and self.accelerator.num_processes > 1
        if self.is_sharded and any(span.stage.after for span in self.spans):
            raise ConfigError("this method rearranges whole experts after a stage: use train.distributed: ddp")
        self.model.to(self.accelerator.device)
        if self.is_sharded:
            shard(self.model, self.accelerator)
        if self.config.only_tasks:
            if self.is_sharded:
                raise ConfigError("train.only_tasks needs whole experts on every process: train.distributed: ddp")
            self.hub.train_only(self.config.only_tasks)

    def _take_best(self) -> None:
        best = self.progress.best_step
        if best is None or best == self.progress.step:
            return
        folder = self.checkpoints.at(best)
        try:
            load_adapter_state(self.model, read_checkpoint(folder).adapter, str(folder))
        except DamagedCheckpoint as error:
            say(f"{error}; the weights of the last step are used instead of the best ones")


def _step_seed(seed: int, step: int, process: int) -> int:
    return (seed * 1_000_003 + step * 1009 + process) % 2**32
