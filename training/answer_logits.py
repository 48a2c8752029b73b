"""Logits and loss only where an answer is: the vocabulary-wide work shrinks from every token to every trained token.

Shapes: B rows, T tokens, D model width, N answer tokens of the batch, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..support.errors import ConfigError

IGNORED = -100
Reduction = Literal["token", "task"]


@dataclass(frozen=True)
class Answers:
    """Where the trained tokens of one batch are predicted.

    Attributes:
        positions: (N,) index into the flattened (B*T,) hidden states that predict them.
        targets: (N,) the token ids to predict.
        rows: (N,) the batch row each belongs to.
    """

    positions: Tensor
    targets: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> "Answers":
        return Answers(*(part.to(device, non_blocking=True) for part in (self.positions, self.targets, self.rows)))


def locate_answers(labels: Tensor, *, shift: bool = True) -> Answers:
    """Find the predicted positions of `labels` (B, T), where -100 means not trained.

    Args:
        shift: True for decoders (token t is predicted at t-1, so the first token never is), False for
            encoder-decoder models, whose decoder inputs are shifted already.
    """
    trained = labels != IGNORED
    if shift:
        trained = F.pad(trained[:, 1:], (0, 1))
    rows, columns = trained.nonzero(as_tuple=True)
    return Answers(rows * labels.shape[1] + columns, labels[rows, columns + int(shift)], rows)


def task_weights(token_counts: Tensor, reduction: Reduction) -> Tensor:
    """The weight (K,) of one token of each of the K tasks, from the trained tokens (K,) of the *global* batch.

    `token`: every token counts the same. `task`: the sum over tasks of each task's mean token loss, so that experts
    which see one task each get the gradient of a run of their own.
    """
    counts = token_counts.to(torch.float32)
    per_token = counts if reduction == "task" else counts.sum().expand_as(counts)
    return torch.where(counts > 0, 1.0 / per_token.clamp(min=1.0), 0.0)


class Losses(NamedTuple):
    """What one micro-batch gives: `total` to call backward on, and detached sums to log."""

    total: Tensor
    row_sums: Tensor
    auxiliary: Tensor


class AnswerHead:
    """Hands a model's LM head only the hidden states at given positions; without positions it changes nothing.

    A forward pre-hook on the output embeddings, which lies outside every checkpointed block and is the same module
    under PEFT, DDP and FSDP; it sees `(B, T, D)` and passes `(1, N, D)` on, so the model returns `(1, N, V)`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._positions: Tensor | None = None
        self._hook = output_head(model).register_forward_pre_hook(self._gather)

    @contextmanager
    def only_at(self, positions: Tensor) -> Iterator[None]:
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def remove(self) -> None:
        self._hook.remove()

    def _gather(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._positions is None:
            return None
        hidden = args[0]
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, self._positions)
        return (chosen.unsqueeze(0), *args[1:])


class Objective(nn.Module):
    """The training loss of a language model under any wrapper, as one forward pass.

    Everything that needs a gradient is inside `forward`, so DDP sees the whole graph, the hub's auxiliary losses
    included.

    Args:
        model: a causal or encoder-decoder model, with or without PEFT.
        hub: what gives `auxiliary_loss()`, the tuner of a loramux model; None for a model without one.
    """

    def __init__(self, model: nn.Module, hub: Any = None) -> None:
        super().__init__()
        self.model = model
        self._hub = (hub,)  # in a tuple: it is a part of `model` already and must not be registered twice
        self._head = AnswerHead(model)
        self.is_encoder_decoder = bool(getattr(base_of(model).config, "is_encoder_decoder", False))

    def forward(
        self,
        inputs: dict[str, Any],
        labels: Tensor,
        answers: Answers,
        token_weights: Tensor,
        auxiliary_weight: float,
    ) -> Losses:
        """Weighted loss of one micro-batch.

        Args:
            inputs: what the model takes (`input_ids`, `attention_mask`, `routing_tasks`).
            labels: (B, T), read only to give an encoder-decoder its decoder inputs and for their row count.
            token_weights: (N,) the weight of each answer token.
            auxiliary_weight: factor on the hub's auxiliary loss.
        """
        logits = self._logits(inputs, labels, answers)
        losses = F.cross_entropy(logits, answers.targets, reduction="none")
        auxiliary = self._auxiliary(losses)
        if (consistency := self._consistency) > 0:
            auxiliary = auxiliary + consistency * symmetric_kl(logits, self._logits(inputs, labels, answers))
        row_sums = losses.new_zeros(labels.shape[0]).index_add(0, answers.rows, losses.detach())
        return Losses((losses * token_weights).sum() + auxiliary_weight * auxiliary, row_sums, auxiliary.detach())

    def _logits(self, inputs: dict[str, Any], labels: Tensor, answers: Answers) -> Tensor:
        """(N, V), in float32."""
        with self._head.only_at(answers.positions):
            logits = self.model(**inputs, **self._decoder_inputs(labels)).logits
        return logits.reshape(-1, logits.shape[-1]).float()

    @property
    def _consistency(self) -> float:
        stage = getattr(self._hub[0], "stage", None)
        return stage.consistency if stage is not None else 0.0

    def release(self) -> None:
        """Take the hook off the model again."""
        self._head.remove()

    def _decoder_inputs(self, labels: Tensor) -> dict[str, Tensor]:
        if not self.is_encoder_decoder:
            return {}
        return {"decoder_input_ids": base_of(self.model).prepare_decoder_input_ids_from_labels(labels=labels)}

    def _auxiliary(self, losses: Tensor) -> Tensor:
        hub = self._hub[0]
        value = hub.auxiliary_loss() if hub is not None else None
        return losses.new_zeros(()) if value is None else value


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """The mean of both divergences between two sets of logits (N, V), averaged over N."""
    p, q = F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: nn.Module) -> nn.Module:
    """The LM head of a model.

    Raises:
        ConfigError: the model has none (it is no language model).
    """
    base = base_of(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise ConfigError(
            f"{type(base).__name__} has no output embeddings; training on answers needs a causal or "
            "encoder-decoder language model (AutoModelForCausalLM or AutoModelForSeq2SeqLM)"
        )
    return head


def sum_by_task(values: Tensor, tasks: Tensor, count: int) -> Tensor:
    """Sum `values` (B,) by the task (B,) of each row into (count,), in float64."""
    return torch.zeros(count, dtype=torch.float64, device=values.device).index_add(0, tasks, values.double())
