"""What stands before the replicas, by itself: whatever becomes of a replica, every answer ends once."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra loramux[ray] is not installed")

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import RequestCancelledError

from loramux.serving.errors import ServingError
from loramux.serving.replicas.front import RemoteEngine
from loramux.serving.replicas.replica import BaseFacts
from loramux.serving.request import BASE, Chunk, Event, Failed, Finished, Request, Sampling

REFUSAL = ServingError("queue_full", "no room", 429)


class Events:
    """A stream of events from a replica, as Ray gives it."""

    def __init__(self, source: AsyncIterator[Event]) -> None:
        self._source, self._was_cancelled = source, False

    def __aiter__(self) -> "Events":
        return self

    async def __anext__(self) -> Event:
        if self._was_cancelled:
            raise RequestCancelledError("1")
        return await anext(self._source)

    def cancel(self) -> None:
        self._was_cancelled = True


class Handle:
    """A handle of replicas that answer with `work`."""

    def __init__(self, work: Callable[..., AsyncIterator[Event]]) -> None:
        self._work = work

    @property
    def answer(self) -> "Handle":
        return self

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, *given: Any) -> Events:
        return Events(self._work(*given))


def events_of(work: Callable[..., AsyncIterator[Event]], *, leaves: bool = False) -> list[Event]:
    """What a request hears of a replica; its client may leave after the first event."""
    heard: list[Event] = []

    async def ask() -> None:
        engine = RemoteEngine(Handle(work), BaseFacts(128, 1000))
        request = Request([1, 2], Sampling(), BASE, heard.append)
        engine.submit(request)
        if leaves:
            await asyncio.sleep(0)
            request.cancel()
        async with asyncio.timeout(5):
            while engine.stats().running:
                await asyncio.sleep(0.01)

    asyncio.run(ask())
    return heard


def failing(error: BaseException) -> Callable[..., AsyncIterator[Event]]:
    async def work(*_: Any) -> AsyncIterator[Event]:
        yield Chunk("a")
        raise error

    return work


async def endless(*_: Any) -> AsyncIterator[Event]:
    while True:
        yield Chunk("a")
        await asyncio.sleep(0.01)


def no_replica(*_: Any) -> AsyncIterator[Event]:
    raise RuntimeError("no replica")


@pytest.mark.parametrize("error", [ActorDiedError(), RuntimeError("home/of/a/replica")])
def test_an_answer_whose_replica_dies_ends_with_an_error_that_tells_nothing_of_the_inside(error):
    *_, end = events_of(failing(error))
    assert end == Failed("engine_error", "the replica that made this answer failed; the server's log says why", 500)


def test_an_answer_that_cannot_be_sent_to_any_replica_ends_too():
    (end,) = events_of(no_replica)
    assert isinstance(end, Failed)


def test_an_answer_whose_client_leaves_ends_as_cancelled():
    *_, end = events_of(endless, leaves=True)
    assert end == Finished("cancelled", 2, 0)


def test_the_refusal_of_a_replica_keeps_its_code_and_status():
    *_, end = events_of(failing(RayTaskError("answer", "a traceback", REFUSAL)))
    assert end == Failed("queue_full", "no room", 429)


def test_a_refusal_comes_whole_from_another_process():
    found = pickle.loads(pickle.dumps(REFUSAL))
    assert (type(found), str(found)) == (ServingError, "no room")
    assert (found.code, found.message, found.status) == ("queue_full", "no room", 429)
