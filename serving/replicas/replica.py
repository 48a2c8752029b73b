"""A replica: one engine, and the adapters that requests brought to it."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

from ray import serve

from ...support.config import parse
from ..config import ServeConfig
from ..errors import ServingError
from ..generations import AdapterInfo, mixed
from ..launch import open_service
from ..ports import Lease
from ..request import BASE, Chunk, Event, Request, Route, Sampling
from ..threads import compute_on_one_thread

RESIDENT = 64
"""Adapters that a replica holds for Ray's multiplexing; the least recently used one leaves."""


@dataclass(frozen=True)
class Content:
    """One generation of an adapter, and where every replica finds it.

    Attributes:
        generation: its content hash, by which replicas call it.
    """

    generation: str
    source: str
    revision: str | None


@dataclass(frozen=True)
class RemoteRoute(Route):
    """A route whose adapters are on the replicas, with their shares."""

    contents: tuple[tuple[Content, float], ...] = ()


@dataclass(frozen=True)
class BaseFacts:
    """What the front has to know of the model."""

    max_length: int
    vocabulary: int


class Resident:
    """An adapter that a replica holds until Ray lets it go; requests in flight finish on what they lease."""

    def __init__(self, store: Any, generation: str) -> None:
        self._store, self._generation = store, generation

    def __del__(self) -> None:
        with suppress(ServingError):  # Ray calls this itself, and Python once more
            self._store.unload(self._generation, force=True)


class Replica:
    """Makes answers; a deployment of Ray Serve.

    Args:
        settings: of `ServeConfig`, as data: a base, and roots below which adapters lie.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        config = parse(ServeConfig, settings, where="settings")
        self._service, self._engine = open_service(config, {}, threads=compute_on_one_thread())
        self._most_rank = config.memory.rank
        self._contents: dict[str, Content] = {}
        self._engine.start()

    def facts(self) -> BaseFacts:
        return BaseFacts(self._engine.max_length, self._service.vocabulary)

    def check_health(self) -> None:
        """Raises RuntimeError once the engine has died; Ray asks, and starts another replica then."""
        if not self._engine.is_alive:
            raise RuntimeError("the engine has stopped")

    async def examine(self, source: str, revision: str | None) -> AdapterInfo:
        """Read an adapter to see what it is; it is not kept."""
        name = uuid.uuid4().hex
        info = await asyncio.to_thread(self._service.store.load, name, source, revision=revision)
        await asyncio.to_thread(self._service.store.unload, name, force=True)
        return info

    async def embed(self, prompts: list[list[int]]) -> Any:
        return await asyncio.wrap_future(self._engine.embed(prompts))

    async def answer(
        self,
        prompt: list[int],
        sampling: Sampling,
        name: str,
        contents: Sequence[tuple[Content, float]],
        age_s: float,
        seconds: float | None,
        streams: bool,
    ) -> AsyncIterator[Event]:
        """The events of one answer.

        Args:
            age_s: seconds since the front was asked.
            seconds: until the answer must be whole; None for never.

        Raises:
            ServingError: an adapter cannot be had, or the engine refuses.
        """
        loop, events, now = asyncio.get_running_loop(), asyncio.Queue[Event](), time.monotonic()

        def take(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        with ExitStack() as leases:
            route = await self._route(name, contents, leases)
            deadline = None if seconds is None else now + seconds
            request = Request(prompt, sampling, route, take, streams=streams, deadline=deadline, arrived=now - age_s)
            self._engine.submit(request)
            try:
                while True:
                    event = await events.get()
                    yield event
                    if not isinstance(event, Chunk):
                        return
            finally:
                request.cancel()

    @serve.multiplexed(max_num_models_per_replica=RESIDENT)
    async def resident(self, generation: str) -> Resident:
        content = self._contents[generation]
        info = await asyncio.to_thread(self._service.store.load, generation, content.source, revision=content.revision)
        if info.generation != generation:
            await asyncio.to_thread(self._service.store.unload, generation, force=True)
            raise ServingError(
                "adapter_files_changed",
                f"{content.source}: its files are not those that were loaded; replace it to serve the new ones",
                503,
            )
        return Resident(self._service.store, generation)

    async def _route(self, name: str, contents: Sequence[tuple[Content, float]], leases: ExitStack) -> Route:
        parts: list[tuple[Route, float]] = []
        for content, share in contents:
            lease = await self._leased(content)
            leases.callback(lease.release)
            parts.append((lease.route, share))
        return replace(mixed(parts, self._most_rank), name=name) if parts else BASE

    async def _leased(self, content: Content) -> Lease:
        while True:
            self._contents[content.generation] = content
            await self.resident(content.generation)
            try:
                return await asyncio.to_thread(self._service.store.lease, content.generation)
            except ServingError as error:
                if error.code != "adapter_not_found":  # else others pushed it out in between
                    raise
