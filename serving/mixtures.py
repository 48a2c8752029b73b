"""Mixtures that route every token themselves, as models of their own in a batch with everybody else."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ..adapters import LoramuxModel
from ..routing import Granularity
from ..routing.context import task_ids
from ..support.errors import ConfigError
from .request import Route


class Mixtures:
    """The adapters of a hub that serve as models.

    Args:
        hub: the tuner that holds them; its model is the one that runs.
        adapters: the hub's adapter by the name it is served under.

    Raises:
        ConfigError: an adapter does not route tokens layer by layer.
    """

    def __init__(self, hub: LoramuxModel, adapters: Mapping[str, str]) -> None:
        self._hub, self._adapters = hub, dict(adapters)
        for name, adapter in self._adapters.items():
            method = hub.method(adapter)
            if method.granularity != Granularity.TOKEN:
                raise ConfigError(f"mixture {name!r} does not route tokens: serve its exported tasks")
            if any(branch.is_shared for branch in method.branches):
                raise ConfigError(
                    f"mixture {name!r} routes by a first pass of the base, which cannot share a batch: serve its "
                    "exported tasks"
                )

    @property
    def names(self) -> list[str]:
        return list(self._adapters)

    def tasks(self, name: str) -> list[str]:
        """The tasks one of which has to be named with a request; empty where none is needed."""
        adapter = self._adapters[name]
        needed = any(branch.needs_task for branch in self._hub.method(adapter).branches)
        return list(self._hub.peft_config[adapter].tasks) if needed else []

    @contextmanager
    def serving(self, routes: Sequence[Route]) -> Iterator[None]:
        """Let each row of a batch be answered by the mixture it names, or by none."""
        context = self._hub.context
        rows: dict[str, list[int]] = {}
        for row, route in enumerate(routes):
            rows.setdefault(self._adapters[route.mixture] if route.mixture else "__base__", []).append(row)
        context.bypass = set(rows) == {"__base__"}
        context.adapter_rows = {adapter: torch.tensor(numbers) for adapter, numbers in rows.items()}
        context.tasks = {
            adapter: task_ids([routes[row].task for row in numbers], self._hub.peft_config[adapter].tasks)
            for adapter, numbers in rows.items()
            if adapter != "__base__" and routes[numbers[0]].task is not None
        }
        context.token_mask = None
        try:
            yield
        finally:
            context.bypass, context.adapter_rows, context.tasks = False, None, {}
