"""Which token comes next, for every row of a batch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grammar import Grammar
from .request import Sampling


class RowSampler:
    """How one row chooses; keeps what it chose so far."""

    def __init__(self, sampling: Sampling, grammar: Grammar | None, device: torch.device) -> None:
        self.sampling, self.grammar = sampling, grammar
        self.generator: torch.Generator | None = None
        if sampling.seed is not None:
            self.generator = torch.Generator(device=device).manual_seed(sampling.seed)
        self._made: Counter[int] = Counter()

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature == 0

    def adjust(self, logits: Tensor) -> None:
        """Apply biases, penalties and the grammar to logits `(vocabulary,)`, in place."""
        if self.sampling.logit_bias:
            _add(logits, self.sampling.logit_bias)
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        if self._made and (presence or frequency):
            _add(logits, {token: -presence - frequency * count for token, count in self._made.items()})
        if self.grammar is not None:
            self.grammar.restrict(logits)

    def note(self, token: int) -> None:
        self._made[token] += 1
        if self.grammar is not None:
            self.grammar.accept(token)


@dataclass(frozen=True)
class Choices:
    """The tokens chosen for a batch.

    Attributes:
        tokens: one per row.
        logprobs: by row that asked, the log-probability of its token and of the likeliest ones as `(token, logprob)`.
        broken: rows whose logits are not finite; their tokens mean nothing.
    """

    tokens: list[int]
    logprobs: dict[int, tuple[float, list[tuple[int, float]]]]
    broken: set[int]


def choose(logits: Tensor, rows: Sequence[RowSampler]) -> Choices:
    """Choose a token for every row.

    Args:
        logits: `(rows, vocabulary)`.
    """
    logits = logits.float()
    broken = set((~logits.isfinite().all(-1)).nonzero().flatten().tolist())
    asked = [row for row, sampler in enumerate(rows) if sampler.sampling.logprobs is not None]
    reports = logits[asked].log_softmax(-1)  # of the model's own distribution, before anything is applied
    for row, sampler in enumerate(rows):
        sampler.adjust(logits[row])
    tokens = logits.argmax(-1)
    sampled = [row for row, sampler in enumerate(rows) if not sampler.is_greedy and row not in broken]
    if sampled:
        tokens[sampled] = _sample(logits[sampled], [rows[row] for row in sampled])
    chosen = tokens.tolist()
    logprobs = {row: _report(reports[i], chosen[row], rows[row].sampling.logprobs or 0) for i, row in enumerate(asked)}
    return Choices(chosen, logprobs, broken)


def _sample(logits: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """Temperature, then top-k, then top-p, as transformers' generate has them."""
    settings: list[Any] = [row.sampling for row in rows]
    coldest = torch.finfo(logits.dtype).tiny
    temperatures = torch.tensor([max(s.temperature, coldest) for s in settings], device=logits.device).unsqueeze(1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperatures  # the best stays at 0, however cold
    size = logits.shape[-1]
    if any(s.top_k for s in settings):
        kept = torch.tensor([min(s.top_k or size, size) for s in settings], device=logits.device).unsqueeze(1)
        ranked = logits.sort(-1, descending=True).values
        logits = logits.masked_fill(logits < ranked.gather(-1, kept - 1), -torch.inf)
    if any(s.top_p < 1 for s in settings):
        top_p = torch.tensor([s.top_p for s in settings], device=logits.device).unsqueeze(1)
        ranked, order = logits.sort(-1)
        unlikely = ranked.softmax(-1).cumsum(-1) <= 1 - top_p
        unlikely[:, -1] = False
        logits = logits.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)
    shares = logits.softmax(-1)
    drawn = [torch.multinomial(share, 1, generator=row.generator) for share, row in zip(shares, rows, strict=True)]
    return torch.cat(drawn)


def _report(logprobs: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    top = logprobs.topk(count)
    return float(logprobs[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _add(logits: Tensor, amounts: Any) -> None:
    index = torch.tensor(list(amounts), device=logits.device)
    logits.index_add_(0, index, torch.tensor(list(amounts.values()), dtype=logits.dtype, device=logits.device))
