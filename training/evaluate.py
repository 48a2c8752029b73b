"""What a model can do on each task: closed choices by option likelihood, open answers by greedy generation."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from ..adapters import LoramuxModel
from ..support.console import Meter, meter
from ..support.errors import AdapterError
from ..tasks import Encoded, EncodedTask, Example, as_written, compute
from .answers import Respondent

Routing = Literal["named", "auto"]
Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Question:
    """One example to be answered, and its place in the split."""

    index: int
    example: Example
    encoded: Encoded

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.encoded.input_ids[: self.encoded.prompt_length]

    @property
    def answer(self) -> tuple[int, ...]:
        return self.encoded.input_ids[self.encoded.prompt_length :]

    @property
    def options(self) -> list[tuple[int, ...]]:
        """What is scored: the choices, where answers are closed, and last of all the reference answer."""
        return [*(self.encoded.choices or ()), self.answer]


@dataclass(frozen=True)
class Prediction:
    """What the model answered.

    Attributes:
        log_likelihood: of the reference answer, in nats, summed over its `tokens`.
        route: the expert that the prompt router chose, by task name, where there is one.
    """

    task: str
    index: int
    prompt: str
    reference: str
    prediction: str
    log_likelihood: float
    tokens: int
    route: str | None = None


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EncodedTask],
    *,
    split: str = "test",
    routing: Routing = "named",
    limit: int | None = None,
    batch_size: int = 64,
    length_normalised: bool = False,
    predictions: list[Prediction] | None = None,
    title: str | None = "evaluate",
    shared: bool = True,
) -> Scores:
    """Score a model on every task; the same on one or many processes.

    Args:
        model: a causal LM, bare or with adapters, unwrapped from DDP. It is left in the mode it came in.
        routing: `named` tells the model which task each prompt is of; `auto` leaves that to its router.
        limit: examples per task, drawn once and for all; None takes the whole split.
        batch_size: prompts per forward.
        length_normalised: compare options by log-likelihood per token instead of their sum.
        predictions: filled with every answer, on every process.
        title: of the progress display; None shows none.
        shared: whether all processes call this and share the work; False where one process works alone.

    Returns:
        Per task its metrics (0..1, higher is better), `loss` (nats per answer token), `examples`, and under `auto`
        the `routing_accuracy` of a router that picks experts by task.
    """
    exam = _Exam(
        model=model,
        tokenizer=tokenizer,
        routing=routing,
        batch_size=batch_size,
        length_normalised=length_normalised,
        shared=shared,
    )
    found = exam.take(tasks, split, limit, title)
    if predictions is not None:
        predictions.extend(answer for task in tasks for answer in found[task.name])
    return {task.name: score(found[task.name], task.task.metrics) for task in tasks}


def score(predictions: Sequence[Prediction], metrics: Sequence[str]) -> dict[str, float]:
    """Metrics, loss and routing accuracy of the predictions of one task."""
    texts = [p.prediction for p in predictions], [p.reference for p in predictions]
    result = dict(compute(tuple(metrics), *texts))
    result["loss"] = -sum(p.log_likelihood for p in predictions) / max(sum(p.tokens for p in predictions), 1)
    result["examples"] = float(len(predictions))
    routed = [p.route == p.task for p in predictions if p.route is not None]
    if routed:
        result["routing_accuracy"] = sum(routed) / len(routed)
    return result


def mean_score(scores: Scores, tasks: Sequence[EncodedTask]) -> float:
    """The mean over tasks of each task's first metric."""
    return sum(scores[task.name][task.task.metrics[0]] for task in tasks) / len(tasks)


@dataclass(frozen=True, kw_only=True)
class _Exam:
    """How questions are put to a model."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    routing: Routing
    batch_size: int
    length_normalised: bool
    shared: bool

    def take(
        self, tasks: Sequence[EncodedTask], split: str, limit: int | None, title: str | None
    ) -> dict[str, list[Prediction]]:
        """All answers by task, in the order of the split; every process gets all of them."""
        drawn = {task.name: questions(task, split, limit) for task in tasks}
        work = [(task, batch) for task in tasks for batch in self._batches(drawn[task.name])]
        answers: list[Prediction] = []
        with eval_mode(self.model), _main_meter(title, sum(len(batch) for _, batch in work)) as progress:
            for task, batch in work:
                answers += self._answer(task, batch)
                if progress is not None:
                    progress.advance(len(batch), task.name)
        if self._divides_work:
            answers = _gathered(answers)
        by_place = sorted(answers, key=lambda answer: answer.index)
        return {task.name: [a for a in by_place if a.task == task.name] for task in tasks}

    def _batches(self, chosen: Sequence[Question]) -> list[list[Question]]:
        """The batches of this process: alike in length, the longest first."""
        ordered = sorted(chosen, key=lambda q: (-len(q.encoded.input_ids), q.index))
        batches = [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        return batches[_rank() :: _world()] if self._divides_work else batches

    @property
    def _divides_work(self) -> bool:
        return self.shared and not _is_sharded(self.model)

    def _answer(self, task: EncodedTask, batch: Sequence[Question]) -> list[Prediction]:
        respondent = Respondent(self.model, self.tokenizer, routing_of(self.model, task.name, self.routing))
        scores = respondent.option_scores([q.prompt for q in batch], [q.options for q in batch])
        routes = self._routes(respondent, len(batch))
        answers = self._answers(task, batch, scores, respondent)
        return [
            Prediction(
                task=task.name,
                index=question.index,
                prompt=question.example.prompt,
                reference=reference,
                prediction=prediction,
                log_likelihood=values[-1],
                tokens=len(question.answer),
                route=route,
            )
            for question, values, route, (prediction, reference) in zip(batch, scores, routes, answers, strict=True)
        ]

    def _routes(self, respondent: Respondent, count: int) -> Sequence[str | None]:
        routes = respondent.routes() if self.routing == "auto" else None
        return [None] * count if routes is None else routes

    def _answers(
        self,
        task: EncodedTask,
        batch: Sequence[Question],
        scores: list[list[float]],
        respondent: Respondent,
    ) -> list[tuple[str, str]]:
        """Prediction and reference of every question: the likeliest choice, or the text the model writes."""
        pairs = [
            (self._best(q, values) if q.encoded.choices else "", q.example.target)
            for q, values in zip(batch, scores, strict=True)
        ]
        rows = [row for row, question in enumerate(batch) if not question.encoded.choices]
        if rows:
            prompts = [batch[row].prompt for row in rows]
            produced = respondent.generate(prompts, task.task.config.max_new_tokens, task.stop_ids)
            texts = self.tokenizer.batch_decode(produced, skip_special_tokens=True)
            references = as_written([batch[row].example.target for row in rows], self.tokenizer)
            for row, text, reference in zip(rows, texts, references, strict=True):
                pairs[row] = text.strip(), reference
        return pairs

    def _best(self, question: Question, scores: Sequence[float]) -> str:
        """The text of the likeliest choice; the first of equals."""
        choices = question.encoded.choices or ()
        lengths = [len(choice) if self.length_normalised else 1 for choice in choices]
        values = [value / length for value, length in zip(scores, lengths, strict=False)]
        return (question.example.choices or ())[values.index(max(values))]


def questions(task: EncodedTask, split: str, limit: int | None) -> list[Question]:
    """The examples of a split (see `EncodedTask.split_used`); `limit` draws the same ones every time."""
    split = task.split_used(split)
    pairs = zip(task.examples[split], task.splits[split], strict=True)
    found = [Question(index, example, encoded) for index, (example, encoded) in enumerate(pairs)]
    if limit is None or limit >= len(found):
        return found
    return [found[i] for i in sorted(random.Random(0).sample(range(len(found)), limit))]


def hub_of(model: nn.Module) -> LoramuxModel | None:
    """The tuner of a loramux model; None for a bare model or another adapter type."""
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, LoramuxModel) else None


def routing_of(model: nn.Module, task: str, routing: Routing) -> dict[str, Any]:
    """The keywords that route a call for `task`.

    Raises:
        AdapterError: for `auto` when the method must be told the task.
    """
    hub = hub_of(model)
    if hub is None:
        return {}
    if routing == "named":
        return {"routing_tasks": task} if hub.tasks else {}
    if hub.needs_task:
        raise AdapterError("this adapter is routed by task and has no router that reads prompts: name the task")
    return {}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in the block; every module is as it was afterwards."""
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


@contextmanager
def _main_meter(title: str | None, total: int) -> Iterator[Meter | None]:
    if title is None or _rank() != 0:
        yield None
        return
    with meter(title, total) as progress:
        yield progress


def _gathered(answers: list[Prediction]) -> list[Prediction]:
    if _world() == 1:
        return answers
    parts: list[list[Prediction]] = [[] for _ in range(_world())]
    dist.all_gather_object(parts, answers)
    return [answer for part in parts for answer in part]


def _is_sharded(model: nn.Module) -> bool:
    """Whether every process must run the same forwards, because each holds a part of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
