"""What stands before the replicas: the ports of the HTTP side, answered by handles of Ray Serve."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import Any

from ray.exceptions import RayTaskError
from torch import Tensor

from ..choice import Choice
from ..engine import EngineStats
from ..errors import ServingError
from ..generations import AdapterInfo, Lease
from ..names import check_expected, check_name, exists, not_found
from ..request import Chunk, Failed, Finished, Request, mixed_weights
from .replica import BaseFacts, Content, RemoteRoute

log = logging.getLogger("loramux.serving")

_CANCEL_S = 0.1
_THREADS = 16


def call(work: Callable[[], Any]) -> Any:
    """Ask a replica and wait for what it says; its refusals are ours."""
    try:
        return work()
    except RayTaskError as error:
        raise _refusal(error) from None


def embedder(replicas: Any) -> Callable[[list[list[int]]], "Future[Tensor]"]:
    """Has prompts read by any replica, as `Engine.embed` has them read."""
    threads = ThreadPoolExecutor(_THREADS, "loramux-replicas")
    return lambda prompts: threads.submit(lambda: call(replicas.embed.remote(prompts).result))


def _refusal(error: Exception) -> Exception:
    """What a replica refused, out of Ray's error around it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ServingError) else error


class RemoteEngine:
    """Answers are made by whichever replica Ray chooses: one that has the adapter in memory, if it is not too busy."""

    is_alive = True

    def __init__(self, replicas: Any, facts: BaseFacts) -> None:
        self._replicas, self._facts = replicas, facts
        self.embed = embedder(replicas)
        self._running: set[asyncio.Task[None]] = set()
        self._finished = self._tokens = 0

    @property
    def max_length(self) -> int:
        return self._facts.max_length

    def submit(self, request: Request) -> None:
        """Send a request on; called in the event loop."""
        task = asyncio.get_running_loop().create_task(self._answer(request))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def stats(self) -> EngineStats:
        """Of the front; what waits in replicas is in Ray's own metrics."""
        return EngineStats(len(self._running), 0, 0, {}, 0, 0, self._finished, self._tokens)

    async def _answer(self, request: Request) -> None:
        """The events of a replica, of which an end is the last whatever becomes of the replica."""
        end: Finished | Failed = Finished("cancelled", len(request.prompt), 0)
        try:
            end = await self._relayed(request)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            if not request.is_cancelled:
                end = _failed(error)
        self._finished += 1
        if isinstance(end, Finished):
            self._tokens += end.completion_tokens
        request.emit(end)

    async def _relayed(self, request: Request) -> Finished | Failed:
        contents = getattr(request.route, "contents", ())
        now = time.monotonic()
        seconds = None if request.deadline is None else request.deadline - now
        handle = self._replicas.options(stream=True, multiplexed_model_id=contents[0][0].generation if contents else "")
        events = handle.answer.remote(
            request.prompt,
            request.sampling,
            request.route.name,
            contents,
            now - request.arrived,
            seconds,
            request.streams,
        )
        watch = asyncio.get_running_loop().create_task(_cancel_with(request, events))
        end = None
        try:
            async for event in events:
                if isinstance(event, Chunk):
                    request.emit(event)
                else:
                    end = event
        finally:
            watch.cancel()
        if end is None:
            raise RuntimeError("the replica ended before the answer did")
        return end


def _failed(error: Exception) -> Failed:
    refusal = _refusal(error)
    if isinstance(refusal, ServingError):
        return Failed(refusal.code, refusal.message, refusal.status)
    log.error("a replica failed", exc_info=error)
    return Failed("engine_error", "the replica that made this answer failed; the server's log says why")


async def _cancel_with(request: Request, events: Any) -> None:
    while not request.is_cancelled:
        await asyncio.sleep(_CANCEL_S)
    events.cancel()


class RemoteChooser:
    """Asks the deployment that chooses; see `choosing.Choosing`."""

    def __init__(self, choosing: Any) -> None:
        self._choosing = choosing

    def choose(self, prompt: list[int]) -> Choice:
        return call(self._choosing.choose.remote(prompt).result)


class RemoteStore:
    """The adapters by name. Replicas read them when the first request comes; see `store.AdapterStore` for what is the
    same here."""

    def __init__(self, replicas: Any, reserved: Sequence[str]) -> None:
        self._replicas, self._reserved = replicas, frozenset(reserved)
        self._infos: dict[str, AdapterInfo] = {}
        self._listeners: list[Callable[[], None]] = []
        self._prompts: dict[str, tuple[str, ...]] = {}
        self._lock = Lock()

    def list(self) -> tuple[AdapterInfo, ...]:
        with self._lock:
            return tuple(self._infos.values())

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def held(self) -> None:
        """Adapters are in the memory of replicas."""

    def examples(self) -> dict[str, tuple[str, ...]]:
        """Of every adapter, the prompts that tell what it is for."""
        with self._lock:
            return dict(self._prompts)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change; it must be quick."""
        self._listeners.append(listener)

    def load(
        self,
        name: str,
        source: str,
        *,
        revision: str | None = None,
        expected_generation: str | None = None,
        pin: bool = False,
        prompts: Sequence[str] = (),
    ) -> AdapterInfo:
        if pin:
            raise _no_pins()
        check_name(name, self._reserved)
        found = call(self._replicas.examine.remote(str(source), revision).result)
        info = replace(found, name=name, state="disk", leases=0)
        with self._lock:
            if expected_generation is not None:
                check_expected(name, self._known(name).generation, expected_generation)
            elif name in self._infos and self._infos[name].generation != info.generation:
                raise exists(name)
            self._infos[name] = info
            self._prompts[name] = tuple(prompts) or self._prompts.get(name, ())
        self._tell()
        return info

    def replace(
        self,
        name: str,
        source: str,
        *,
        expected_generation: str,
        revision: str | None = None,
        prompts: Sequence[str] = (),
    ) -> AdapterInfo:
        return self.load(name, source, revision=revision, expected_generation=expected_generation, prompts=prompts)

    def unload(self, name: str, *, force: bool = False) -> None:
        """Forget a name; answers in the making finish on the replicas."""
        with self._lock:
            self._known(name)
            del self._infos[name], self._prompts[name]
        self._tell()

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        raise _no_pins()

    def lease_now(self, name: str) -> Lease:
        with self._lock:
            info = self._known(name)
        route = RemoteRoute(name, str(info.generation), contents=((_content(info), 1.0),))
        return Lease(route, (info,), _nothing_to_give_back)

    lease = lease_now

    def mix(self, weights: Mapping[str, float]) -> Lease:
        with self._lock:
            infos = tuple(self._known(name) for name in weights)
        contents = tuple((_content(info), float(weights[info.name])) for info in infos)
        key = mixed_weights([(content.generation, share) for content, share in contents])
        return Lease(RemoteRoute("+".join(weights), key, contents=contents), infos, _nothing_to_give_back)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def _known(self, name: str) -> AdapterInfo:
        if name not in self._infos:
            raise not_found(name)
        return self._infos[name]


def _nothing_to_give_back() -> None:
    """Replicas lease what they answer with."""


def _content(info: AdapterInfo) -> Content:
    return Content(str(info.generation), info.source, info.revision)


def _no_pins() -> ServingError:
    return ServingError("pin_unsupported", "adapters are not pinned over replicas; each keeps those it used last", 400)
