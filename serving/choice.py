"""The automatic choice: which adapter answers a prompt, decided once, on what the bare base makes of the prompt."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..routing import Prototypes as PrototypeScorer
from ..routing import Router
from .errors import ServingError

Embed = Callable[[list[list[int]]], Future[Tensor]]
"""Gives the mean last hidden state of the bare base over each prompt, `(prompts, width)`."""

TEMPERATURE = 0.02
"""Of cosines: mean hidden states of a language model all point much the same way."""
_MOST_TOLD = 10


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        adapter: None for the bare base.
        weight: of the likeliest adapter, whether it was chosen or not; 0 where there was none to choose.
        weights: of the likeliest adapters, the largest first; those of all adapters sum to one.
    """

    adapter: str | None
    weight: float
    weights: Mapping[str, float]


class Scorer(Protocol):
    """Says how well adapters fit a prompt."""

    def scores(self, pooled: Tensor) -> tuple[Sequence[str], Tensor]:
        """Names and their scores `(names,)`, of which the softmax is taken, for one pooled prompt `(width,)`."""
        ...


class LearnedRouter:
    """The router of a trained run.

    Args:
        router: it decides once per sequence.
        experts: the adapter of each of its gates.
    """

    def __init__(self, router: Router, experts: Sequence[str]) -> None:
        self._router, self._experts = router, tuple(experts)
        self._temperature = TEMPERATURE if isinstance(router.scorer, PrototypeScorer) else 1.0

    @torch.inference_mode()
    def scores(self, pooled: Tensor) -> tuple[Sequence[str], Tensor]:
        return self._experts, self._router(pooled[None], None).scores[0] / self._temperature


class Chooser:
    """Picks adapters; `choose` may be called from any thread.

    Args:
        scorer: a learned router, or prototypes.
        served: gives the names of the adapters that take requests now; no other is chosen.
        embed: of the engine.
        threshold: an adapter that weighs less leaves the answer to the base.
        timeout_s: seconds to wait for the engine.
    """

    def __init__(
        self,
        scorer: Scorer,
        served: Callable[[], Collection[str]],
        embed: Embed,
        *,
        threshold: float = 0.0,
        timeout_s: float = 60.0,
    ) -> None:
        self._scorer, self._served, self._embed = scorer, served, embed
        self._threshold, self._timeout_s = threshold, timeout_s

    def choose(self, prompt: list[int]) -> Choice:
        """Choose for the token ids of one prompt.

        Raises:
            ServingError: `choice_timeout` when the engine did not read the prompt in time, or what the engine raises.
        """
        try:
            pooled = self._embed([prompt]).result(self._timeout_s)[0]
        except TimeoutError:
            raise ServingError(
                "choice_timeout",
                f"the prompt was not read within {self._timeout_s:g} s; name an adapter, or try again",
                504,
            ) from None
        return self.decide(pooled)

    def decide(self, pooled: Tensor) -> Choice:
        """Choose for one pooled prompt `(width,)`."""
        names, scores = self._scorer.scores(pooled)
        served = self._served()
        present = [index for index, name in enumerate(names) if name in served]
        if not present:
            return Choice(None, 0.0, {})
        weights = torch.softmax(scores[present].float(), dim=-1)
        order = weights.argsort(descending=True, stable=True)[:_MOST_TOLD].tolist()
        told = {names[present[index]]: float(weights[index]) for index in order}
        best, weight = next(iter(told.items()))
        return Choice(best if weight >= self._threshold else None, weight, told)
