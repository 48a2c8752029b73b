"""What the HTTP side asks of the parts behind it, so that they can be other processes as well."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from torch import Tensor

from .generations import AdapterInfo, Held
from .request import Request, Route


class Engine(Protocol):
    """Makes answers; see `engine.Engine`."""

    @property
    def max_length(self) -> int: ...

    @property
    def is_alive(self) -> bool: ...

    def submit(self, request: Request) -> None: ...

    def embed(self, prompts: list[list[int]]) -> Future[Tensor]: ...

    def stats(self) -> Any: ...


class Lease(Protocol):
    """Adapters that stay as they are until the lease is given back."""

    @property
    def route(self) -> Route: ...

    def release(self) -> None: ...


class Store(Protocol):
    """Holds adapters; see `store.AdapterStore`. What may read from disk or wait is called in threads."""

    def lease(self, name: str) -> Lease: ...

    def lease_now(self, name: str) -> Lease | None: ...

    def mix(self, weights: Mapping[str, float]) -> Lease: ...

    def __contains__(self, name: str) -> bool: ...

    def held(self) -> Held | None:
        """What is in this process's memory; None where adapters are elsewhere."""

    def list(self) -> Sequence[AdapterInfo]: ...

    def load(
        self,
        name: str,
        source: str,
        *,
        revision: str | None = None,
        pin: bool = False,
        prompts: Sequence[str] = (),
    ) -> AdapterInfo: ...

    def replace(
        self,
        name: str,
        source: str,
        *,
        expected_generation: str,
        revision: str | None = None,
        prompts: Sequence[str] = (),
    ) -> AdapterInfo: ...

    def unload(self, name: str, *, force: bool = False) -> None: ...

    def pin(self, name: str, pinned: bool) -> AdapterInfo: ...


class Chooser(Protocol):
    """Picks an adapter for a prompt; see `choice.Chooser`."""

    def choose(self, prompt: list[int]) -> Any: ...
