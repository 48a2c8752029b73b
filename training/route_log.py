"""What routers decide while they train: how many experts are in use, and a word when one takes everything."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from ..adapters import LoramuxModel, find_method
from ..routing import Granularity, LayerUsage, OwnTokenGate, Router, RoutingStatistics
from .distributed import all_sum
from .progress import Progress
from .recipe import TrainConfig

COLLAPSED_BELOW = 1.5
"""Effective experts of a router that lets one expert carry nearly everything."""
COLLAPSED_FOR = 200
"""Steps in a row after which that is told."""
_COUNT_EVERY = 4
_MANY = 4
_MOST_NAMED = 8
_KNOBS = ("balance_loss", "balance_rate", "temperature")
Sums = dict[str, list[float]]


class RouteLog:
    """Counts decisions as training makes them; the sums live in the run's `Progress`, so that a resumed run goes on.

    Every fourth step is counted, and the one before each log line: counting can cost 4 % of a step where routers are
    as large as the linears beside them.

    Args:
        hub: the model's tuner.
    """

    def __init__(self, hub: LoramuxModel, config: TrainConfig, accelerator: Accelerator) -> None:
        self.hub, self.config, self.accelerator = hub, config, accelerator
        self._statistics = self._nothing_yet()

    @contextmanager
    def counting(self, step: int) -> Iterator[None]:
        """Count the decisions of the training pass in the block. A checkpointed part that runs again counts once.

        Args:
            step: that the pass is part of, from 1.
        """
        if step % _COUNT_EVERY and step % self.config.log_every and step != self.config.steps:
            yield
            return
        with self.hub.observing_routes(self._statistics):
            yield
        self._statistics.count()

    def fold(self, progress: Progress) -> None:
        """Put what was counted, on all processes, into the sums of `progress`. Every process must call this."""
        counted, self._statistics = self._statistics.layers, self._nothing_yet()
        routers = self.hub.named_routers()
        if not routers:
            return
        parts = [_flat(counted.get(name), router.gates) for name, router in routers.items()]
        summed = all_sum(torch.cat(parts), self.accelerator).split([len(part) for part in parts])
        for name, values in zip(routers, summed, strict=True):
            if float(values[0]):
                before = progress.routing.get(name, [0.0] * len(values))
                progress.routing[name] = [a + b for a, b in zip(before, values.tolist(), strict=True)]

    def take(self, progress: Progress) -> tuple[dict[str, float], dict[str, str]]:
        """The figures of a log line and its labels, both empty where no router decided anything since the last one.

        Collapsed routers are counted in `progress`. Every process must call this.
        """
        self.fold(progress)
        sums, progress.routing = progress.routing, {}
        steps, progress.logged_step = progress.step - progress.logged_step, progress.step
        if not sums:
            return {}, {}
        routers = self.hub.named_routers()
        effective = {name: _effective(values, routers[name]) for name, values in sums.items()}
        _count_collapsed(progress, {name: routers[name] for name in sums}, effective, steps)
        fewest = min(effective, key=lambda name: round(effective[name], 3))
        values = {
            "routing/effective_experts": sum(effective.values()) / len(effective),
            "routing/fewest_experts": effective[fewest],
            "routing/entropy": sum(entropy / tokens for tokens, entropy, *_ in sums.values()) / len(sums),
        }
        return values, {"routing/fewest_experts_in": fewest}

    def _nothing_yet(self) -> RoutingStatistics:
        return RoutingStatistics(self.hub.tasks or ["all"])


def warn_of_collapse(hub: LoramuxModel, progress: Progress, config: TrainConfig) -> str | None:
    """What to tell the user of routers that have collapsed, with the knobs to turn; once per run."""
    names = [name for name, steps in progress.collapsed_for.items() if steps >= COLLAPSED_FOR]
    if not names or progress.warned_of_collapse:
        return None
    progress.warned_of_collapse = True
    gates = max(hub.named_routers()[name].gates for name in names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return (
        f"routers have collapsed: for {COLLAPSED_FOR} steps nearly all tokens have gone to the same of {gates} "
        f"experts, at {', '.join(names[:_MOST_NAMED])}{more}. To use more of them, {' or '.join(_knobs(hub, config))}"
    )


def _knobs(hub: LoramuxModel, config: TrainConfig) -> list[str]:
    """What can be turned against a collapse, with its present value."""
    adapter = hub.peft_config[hub.active_adapters[0]]
    options: Mapping[str, Any] = {**find_method(adapter.method).options(), **adapter.options}
    rate = config.router_learning_rate or config.learning_rate
    own = [f"raise method.options.{name} (now {options[name]})" for name in _KNOBS if name in options]
    return [*own, f"lower train.router_learning_rate (now {rate:g})"]


def _count_collapsed(
    progress: Progress, routers: Mapping[str, Router], effective: Mapping[str, float], steps: int
) -> None:
    for name, router in routers.items():
        collapsed = may_collapse(router) and effective[name] < _fewest_sound(router)
        progress.collapsed_for[name] = progress.collapsed_for.get(name, 0) + steps if collapsed else 0


def may_collapse(router: Router) -> bool:
    """Whether a router learns to choose, token by token, among many; one expert per task or text may be the point."""
    learns = any(parameter.requires_grad for parameter in router.parameters())
    chooses = router.granularity == Granularity.TOKEN and not isinstance(router.config.scorer, OwnTokenGate)
    return chooses and learns and router.gates >= _MANY


def _fewest_sound(router: Router) -> float:
    """Effective experts below which a router has collapsed: half an expert above what one token opens at once, where
    there are many times as many."""
    opened = getattr(router.config.normaliser, "k", 1)
    return COLLAPSED_BELOW + opened - 1 if router.gates >= _MANY * opened else COLLAPSED_BELOW


def _flat(layer: LayerUsage | None, gates: int) -> torch.Tensor:
    """Tokens, summed entropy and the weight of each gate, in float64."""
    if layer is None:
        return torch.zeros(2 + gates, dtype=torch.float64)
    ends = torch.stack([layer.tokens.sum(), layer.entropy.sum()])
    return torch.cat([ends, layer.weights.sum(0)]).double()


def _effective(values: Sequence[float], router: Router) -> float:
    tokens, entropy, *weights = values
    summed = torch.tensor([weights], dtype=torch.float64), torch.tensor([tokens]), torch.tensor([entropy])
    return LayerUsage(*summed, router.config.groups).effective_experts()
