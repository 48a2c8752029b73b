"""Which published adapters are likely to help on a task of one's own.

Three signs are put together. How well each adapter predicts a few answers of the task: as it is, in one forward pass
(the few-shot loss; Poth et al. 2021, "What to Pre-Train on?", compare such signs), or better, on one half of the
examples after a short trial on the other. How alike the task's prompts and the prompts on the adapter's card are to the
frozen base (RouterRetriever, Lee et al. 2024). What was measured on the task's own data set, where a card tells. How
sure the order is, resampling of the examples tells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.prompt import pool_prompt
from ..support.console import track
from ..support.errors import ConfigError
from ..tasks import EncodedTask
from ..training.answers import right_padded
from ..training.evaluate import eval_mode
from .trial import answer_losses, losses_of, trial_losses

SIMILARITY_WEIGHT, MEASURED_WEIGHT = 0.25, 0.5
"""Of one standard deviation of similarity, and of a score of 1, against one standard deviation of the few-shot loss."""
_RESAMPLES = 2000
_BATCH = 16


@dataclass(frozen=True)
class Candidate:
    """An adapter that may be recommended.

    Attributes:
        name: how a user finds it.
        folder: a PEFT LoRA of the base, checked already.
        prompts: examples of what it was trained on.
        scores: what it scored, 0..1, by the Hub id of the data set.
    """

    name: str
    folder: Path
    prompts: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Signs:
    """What is known of C candidates over N examples of the task.

    Attributes:
        losses: (C, N), nats per answer token, of each candidate as it is or after its trial on other examples.
        base_losses: (N,), of the base without an adapter; where candidates had a trial, of a fresh LoRA after the same.
        similarity: (C, N), cosine of each prompt with the mean prompt of the candidate; NaN where it shows none.
        measured: (C,), its score on the task's own data set; NaN where that was not measured.
    """

    losses: Tensor
    base_losses: Tensor
    similarity: Tensor
    measured: Tensor


@dataclass(frozen=True)
class Recommended:
    """A candidate with what speaks for it.

    Attributes:
        value: what candidates are ordered by; only differences mean something.
        loss: of the task's examples, nats per answer token, and `gain` how much lower that is than `Signs.base_losses`.
        first: the share of resamples of the examples in which it comes first.
        helps: the share of resamples in which it predicts better than the base, or than the fresh LoRA.
    """

    candidate: Candidate
    value: float
    loss: float
    gain: float
    similarity: float | None
    measured: float | None
    first: float
    helps: float


def recommend(
    task: EncodedTask,
    candidates: Sequence[Candidate],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shots: int = 32,
    trial_steps: int = 0,
    seed: int = 0,
) -> list[Recommended]:
    """Order candidates by how much they promise for a task, the best first.

    Args:
        base: bare; it is bare again afterwards.
        shots: examples of the training split to look at.
        trial_steps: steps of training that each candidate gets before it is judged, see `trial_losses`.

    Raises:
        ConfigError: there is nothing to choose from.
    """
    if not candidates:
        raise ConfigError("no adapters to choose from")
    signs = read_signs(task, candidates, base, tokenizer, shots=shots, trial_steps=trial_steps)
    return ordered(candidates, signs, seed=seed)


def read_signs(
    task: EncodedTask,
    candidates: Sequence[Candidate],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shots: int,
    trial_steps: int = 0,
) -> Signs:
    """Ask the base and every candidate about the first `shots` training examples of a task.

    Raises:
        ConfigError: one example cannot be halved for a trial.
    """
    rows = task.splits["train"][:shots]
    prompts = [example.prompt.strip() for example in task.examples["train"][:shots]]
    losses = []
    with eval_mode(base):
        queries = _embedded(prompts, base, tokenizer)
        similarity = [_similarity(queries, candidate, base, tokenizer) for candidate in candidates]
        for candidate in track(candidates, "adapters"):
            if trial_steps:
                losses.append(trial_losses(base, candidate.folder, tokenizer, rows, trial_steps))
            else:
                losses.append(losses_of(base, candidate.folder, tokenizer, rows))
        if trial_steps:
            base_losses = trial_losses(base, candidates[0].folder, tokenizer, rows, trial_steps, fresh=True)
        else:
            base_losses = answer_losses(base, tokenizer, rows)
    data = task.task.config.source.dataset or ""
    measured = [candidate.scores.get(data, float("nan")) for candidate in candidates]
    return Signs(torch.stack(losses), base_losses, torch.stack(similarity), torch.tensor(measured))


def ordered(candidates: Sequence[Candidate], signs: Signs, *, seed: int = 0) -> list[Recommended]:
    """Candidates by value, with what resampling the examples says of it."""
    generator = torch.Generator().manual_seed(seed)
    count = signs.losses.shape[1]
    draws = torch.randint(count, (_RESAMPLES, count), generator=generator)
    shares = F.one_hot(draws, count).sum(1) / count
    firsts = F.one_hot(values(signs, shares).argmax(-1), len(candidates)).float().mean(0)
    helps = (shares @ signs.losses.T < (shares @ signs.base_losses)[:, None]).float().mean(0)
    means, similar = signs.losses.mean(1), signs.similarity.mean(1)
    found = [
        Recommended(
            candidate,
            value,
            means[number].item(),
            (signs.base_losses.mean() - means[number]).item(),
            _known(similar[number]),
            _known(signs.measured[number]),
            firsts[number].item(),
            helps[number].item(),
        )
        for number, (candidate, value) in enumerate(zip(candidates, values(signs).tolist(), strict=True))
    ]
    return sorted(found, key=lambda each: -each.value)


def values(signs: Signs, shares: Tensor | None = None) -> Tensor:
    """One number per candidate from all signs, `(C,)`.

    Without prompts a candidate's similarity counts as an average one; a score that is not known counts nothing.

    Args:
        shares: `(R, N)`, what each example counts in each of R resamples; the result is `(R, C)` then.
    """
    losses = signs.losses.mean(1) if shares is None else shares @ signs.losses.T
    similarity = signs.similarity.mean(1) if shares is None else shares @ signs.similarity.T
    measured = MEASURED_WEIGHT * signs.measured.nan_to_num(0.0)
    return SIMILARITY_WEIGHT * _standardised(similarity) + measured - _standardised(losses)


def _standardised(x: Tensor) -> Tensor:
    """Over the last axis; zero where nothing is known or all are alike."""
    centred = x - x.nanmean(-1, keepdim=True)
    spread = centred.square().nanmean(-1, keepdim=True).sqrt()
    return torch.where(spread > 0, centred / spread, 0.0).nan_to_num(0.0)


def _known(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


def _similarity(
    queries: Tensor, candidate: Candidate, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    if not candidate.prompts:
        return torch.full((len(queries),), float("nan"))
    prototype = _embedded(candidate.prompts, base, tokenizer).mean(0)
    return queries @ F.normalize(prototype, dim=0)


@torch.no_grad()
def _embedded(prompts: Sequence[str], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Mean last hidden states of the base, of length one, `(prompts, width)`."""
    parts = []
    for start in range(0, len(prompts), _BATCH):
        rows = [tokenizer(prompt)["input_ids"] for prompt in prompts[start : start + _BATCH]]
        ids, mask = right_padded(rows, tokenizer.pad_token_id or 0, base.device)
        parts.append(pool_prompt(base, ids, {"attention_mask": mask}, mask.bool()))
    return F.normalize(torch.cat(parts).float().cpu(), dim=-1)
