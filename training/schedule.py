"""Which stage of training a step belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..adapters import StageConfig
from ..support.errors import ConfigError


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


def stage_spans(stages: Sequence[StageConfig], steps: int) -> list[StageSpan]:
    """Divide `steps` among stages by their shares.

    Raises:
        ConfigError: when a stage would get no step at all.
    """
    total = sum(stage.share for stage in stages)
    spans, start, share = [], 0, 0.0
    for stage in stages:
        share += stage.share
        stop = round(steps * share / total)
        if stop <= start:
            raise ConfigError(f"train.steps (={steps}) leaves no step for stage {stage.name!r}; raise it")
        spans.append(StageSpan(stage, start, stop))
        start = stop
    return spans
