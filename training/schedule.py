"""Which stage of training a step belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters import StageConfig
from ..support.errors import ConfigError

_CENTRE, _CORNERS = 5.0, 0.2


@dataclass(frozen=True)
class StageSpan:
    """A stage and its steps, `start` up to but not including `stop`."""

    stage: StageConfig
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def holds(self, step: int) -> bool:
        """Whether training has begun in this stage and not ended after `step` steps."""
        return self.start < step < self.stop


def without_experts(stages: Sequence[StageConfig]) -> tuple[StageConfig, ...]:
    """The same stages for experts that stay as they are; some may have nothing left to train."""
    return tuple(
        replace(
            stage,
            train=tuple(group for group in stage.train if group != "experts"),
            after=tuple(change for change in stage.after if change == "fit_prototypes"),
        )
        for stage in stages
    )


def stage_spans(stages: Sequence[StageConfig], steps: int) -> list[StageSpan]:
    """Divide `steps` by their shares among the stages that train something.

    Raises:
        ConfigError: when one of these would get no step at all.
    """
    total = sum(stage.share for stage in stages if stage.train)
    spans, start, share = [], 0, 0.0
    for stage in stages:
        if not stage.train:
            spans.append(StageSpan(stage, start, start))
            continue
        share += stage.share
        stop = round(steps * share / total)
        if stop <= start:
            raise ConfigError(f"train.steps (={steps}) leaves no step for stage {stage.name!r}; raise it")
        spans.append(StageSpan(stage, start, stop))
        start = stop
    return spans


def draw_preferences(tasks: int, span: StageSpan, step: int, seed: int) -> Tensor:
    """A blend of tasks `(tasks,)` for a step, the same on every process.

    Annealed blends come from a Dirichlet distribution that begins at the centre of the simplex and ends at its corners
    (PaLoRA, Dimitriadis et al. 2024, section 4); uniform ones from the whole simplex.
    """
    progress = (step - span.start) / max(span.length - 1, 1)
    concentration = _CENTRE * (1 - progress) + _CORNERS if span.stage.preferences == "annealed" else 1.0
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    # A Dirichlet draw is a normalised gamma draw, which takes a generator.
    shares = torch._standard_gamma(torch.full((tasks,), concentration, dtype=torch.float64), generator=generator)
    return (shares / shares.sum()).float()
