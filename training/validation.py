"""What a run measures while it trains."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..tasks import EncodedTask
from .evaluate import evaluate_tasks, mean_score
from .loop import SCORE, Evaluate
from .recipe import EvaluateConfig


def validation(tokenizer: PreTrainedTokenizerBase, tasks: Sequence[EncodedTask], config: EvaluateConfig) -> Evaluate:
    """An evaluation on the validation examples.

    It gives `metric` (the mean over tasks of each task's main metric), and by task `metric/<task>`, `loss/<task>` and
    every other figure. A router that the stage has begun to train must choose by itself; before that the task is named.
    """

    def evaluate(model: Any, step: int) -> Mapping[str, float]:
        hub = model.base_model
        routed = hub.routes_by_prompt and hub.stage is not None and "router" in hub.stage.train
        scores = evaluate_tasks(
            model,
            tokenizer,
            tasks,
            split="validation",
            routing="auto" if routed else "named",
            limit=config.during_limit,
            batch_size=config.batch_size,
            length_normalised=config.length_normalised,
            title=f"validate at step {step}",
        )
        values = {f"metric/{task.name}": scores[task.name][task.task.metrics[0]] for task in tasks}
        values |= {
            f"{figure}/{task}": value
            for task, found in scores.items()
            for figure, value in found.items()
            if figure != "examples"
        }
        return {SCORE: mean_score(scores, tasks), **values}

    return evaluate
