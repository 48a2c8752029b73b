"""What an adapter's name stands for: one content at a time, which never changes while anybody uses it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple

from .errors import ServingError
from .factors import PackedLora
from .request import Route, mixed_weights
from .sources import Found

State = Literal["memory", "disk", "unloading"]


class Held(NamedTuple):
    """What is in host memory."""

    adapters: int
    nbytes: int


@dataclass(frozen=True)
class AdapterInfo:
    """What there is to say of an adapter.

    Attributes:
        generation: SHA-256 of its config and weights; None while its weights were never read.
        source: how it was asked for.
        revision: the commit on the Hub.
        modules: linears that it changes.
        nbytes: in host memory, when it is there.
        leases: requests that use it now, of all its generations.
    """

    name: str
    generation: str | None
    source: str
    revision: str | None
    rank: int
    modules: int
    nbytes: int
    state: State
    pinned: bool
    leases: int


@dataclass(eq=False)
class Generation:
    """One content of an adapter. Its factors come and go between disk and memory, and are always the same.

    Attributes:
        sha256: of its config and weights; None while the weights were never read.
        nbytes: of its factors in memory.
        lora: None while it is on disk.
        leases: that hold it, or wait for it.
        retired: replaced or unloaded; it leaves with its last lease.
        loading: the reading under way.
    """

    found: Found
    rank: int
    modules: int
    nbytes: int
    sha256: str | None = None
    lora: PackedLora | None = None
    leases: int = 0
    pinned: bool = False
    retired: bool = False
    loading: Future[None] | None = None


@dataclass(eq=False)
class Adapter:
    """A name and what it stands for now.

    Attributes:
        prompts: examples of what it is for.
        leases: of all its generations.
        leaving: being unloaded; new requests are refused.
    """

    name: str
    generation: Generation
    prompts: tuple[str, ...] = ()
    leases: int = 0
    leaving: bool = False

    @property
    def info(self) -> AdapterInfo:
        own = self.generation
        state: State = "unloading" if self.leaving else "disk" if own.lora is None else "memory"
        return AdapterInfo(
            name=self.name,
            generation=own.sha256,
            source=own.found.origin,
            revision=own.found.revision,
            rank=own.rank,
            modules=own.modules,
            nbytes=own.nbytes,
            state=state,
            pinned=own.pinned,
            leases=self.leases,
        )


class Lease:
    """Adapters that stay as they are, in memory, until the lease is given back.

    Attributes:
        route: for the engine.
        infos: of the adapters, as they were when they were leased.
    """

    def __init__(self, route: Route, infos: tuple[AdapterInfo, ...], give_back: Callable[[], None]) -> None:
        self.route, self.infos = route, infos
        self._give_back: Callable[[], None] | None = give_back

    @property
    def info(self) -> AdapterInfo:
        """Of the first adapter, which is the only one unless it is a mix."""
        return self.infos[0]

    def release(self) -> None:
        """Give it back; a second time does nothing."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def mixed(parts: Sequence[tuple[Route, float]], most_rank: int) -> Route:
    """What answers with a weighted sum of adapters.

    Raises:
        ServingError: `rank_limit_exceeded`.
    """
    rank = sum(route.rank for route, _ in parts)
    if rank > most_rank:
        raise ServingError(
            "rank_limit_exceeded", f"the mix has rank {rank}, the sum of its adapters; at most {most_rank}"
        )
    return Route(
        name="+".join(route.name for route, _ in parts),
        weights=mixed_weights((route.weights, share) for route, share in parts),
        parts=tuple((route.parts[0][0], share) for route, share in parts),
    )
