"""Which adapter answers: the one that is named, a mix of several, a hosted mixture, or the automatic choice."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ServingError
from ..metrics import MIX
from ..ports import Chooser, Lease
from ..request import BASE, Route
from .errors import nearest, shown
from .schemas import Generation
from .service import Service

AUTO = "auto"


@dataclass
class Selection:
    """What answers one prompt.

    Attributes:
        name: of the adapter, the mixture, the base, or of all adapters of a mix with `+` between.
        weight: what the automatic choice gave it; 1 where it was named.
        weights: of a mix, or of all adapters that the automatic choice looked at.
        lease: keeps the adapters as they are; given back by `release`.
    """

    name: str
    route: Route
    weight: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    lease: Lease | None = None

    @property
    def metric_name(self) -> str:
        return MIX if len(self.route.parts) > 1 else self.name

    def release(self) -> None:
        if self.lease is not None:
            self.lease.release()
            self.lease = None


async def select(service: Service, body: Generation, prompts: list[list[int]]) -> list[Selection]:
    """What answers each prompt of a request.

    Raises:
        ServingError: nothing of that name is served, or the parameters contradict each other.
    """
    _check(service, body)
    found = await asyncio.gather(*(_select_one(service, body, prompt) for prompt in prompts), return_exceptions=True)
    errors = [one for one in found if isinstance(one, BaseException)]
    selections = [one for one in found if not isinstance(one, BaseException)]
    if errors:
        for selection in selections:
            selection.release()
        raise errors[0]
    return selections


def model_names(service: Service) -> list[str]:
    """Everything that `model` may be."""
    automatic = [AUTO] if service.chooser is not None else []
    return [*automatic, *(info.name for info in service.store.list()), *service.mixtures, *service.base_names]


def _check(service: Service, body: Generation) -> None:
    if body.adapter is not None and body.adapters is not None:
        raise ServingError("conflicting_parameters", "give either adapter or adapters")
    given = "adapter" if body.adapter is not None else "adapters" if body.adapters is not None else None
    if given is not None and body.model not in (AUTO, *service.base_names):
        raise ServingError("conflicting_parameters", f"{given} goes with model 'auto' or the base; model names one")
    if body.task is not None and body.model not in service.mixtures:
        raise ServingError("conflicting_parameters", "task goes with a hosted mixture that wants one")


async def _select_one(service: Service, body: Generation, prompt: list[int]) -> Selection:
    if body.adapters is not None:
        return await _mix(service, body.adapters)
    if body.adapter is not None:
        return await _named(service, body.adapter)
    if body.model in service.base_names:
        return Selection("base", BASE)
    if body.model in service.mixtures:
        return _mixture(service, body.model, body.task)
    if body.model == AUTO and service.chooser is not None:
        return await _chosen(service, service.chooser, prompt)
    return await _named(service, body.model)


async def _named(service: Service, name: str) -> Selection:
    try:
        lease = await _leased(service, name)
    except ServingError as error:
        if error.code != "adapter_not_found":
            raise
        near = nearest(name, model_names(service))
        raise ServingError("model_not_found", f"model {shown(name)} is not served; {near}", 404) from None
    return Selection(name, lease.route, lease=lease)


async def _leased(service: Service, name: str) -> Lease:
    """At once where the adapter is in memory; else in a thread that waits for the disk."""
    lease = service.store.lease_now(name)
    return lease if lease is not None else await service.with_store(lambda: service.store.lease(name))


async def _mix(service: Service, weights: Mapping[str, float]) -> Selection:
    lease = await service.with_store(lambda: service.store.mix(weights))
    return Selection("+".join(weights), lease.route, weights=dict(weights), lease=lease)


def _mixture(service: Service, name: str, task: str | None) -> Selection:
    tasks = service.mixtures[name]
    if tasks and task not in tasks:
        said = "needs a task" if task is None else f"has no task {shown(task)}"
        raise ServingError("invalid_task", f"mixture {name!r} {said}: give task as one of {', '.join(tasks)}")
    if task is not None and not tasks:
        raise ServingError("invalid_task", f"mixture {name!r} takes no task; leave it out")
    return Selection(name, Route(name, f"mixture:{name}:{task}", mixture=name, task=task))


async def _chosen(service: Service, chooser: Chooser, prompt: list[int]) -> Selection:
    """What the automatic choice picks; once more, where that was unloaded between choice and use."""
    try:
        return await _chosen_once(service, chooser, prompt)
    except ServingError as error:
        if error.code not in ("adapter_not_found", "adapter_unloading"):
            raise
        return await _chosen_once(service, chooser, prompt)


async def _chosen_once(service: Service, chooser: Chooser, prompt: list[int]) -> Selection:
    choice = await service.with_store(lambda: chooser.choose(prompt))
    if choice.adapter is None:
        selection = Selection("base", BASE, choice.weight, choice.weights)
    else:
        lease = await _leased(service, choice.adapter)
        selection = Selection(choice.adapter, lease.route, choice.weight, choice.weights, lease)
    service.metrics.choices.labels(service.metrics.label(selection.name)).inc()
    return selection
