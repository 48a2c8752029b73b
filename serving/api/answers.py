"""The answers of one HTTP request on their way through the engine."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import Request as HttpRequest

from ..errors import ServingError
from ..request import Event, Failed, Finished, Request, Sampling
from .schemas import Generation
from .selection import Selection, select
from .service import Service

log = logging.getLogger("loramux.serving")

_SEEDS = 1 << 63

Read = Callable[[], Awaitable[tuple[list[list[int]], Sampling]]]
"""Makes token ids and settings of what a client sent, which takes time that only those who are admitted may take."""


class Answers:
    """Answers to all prompts of a request, `each` for every prompt; number `i` is of prompt `i // each`.

    What they hold (their place in the queue, their adapters) is given back when the engine says that they ended,
    whatever became of the client by then.
    """

    def __init__(self, service: Service, selections: Sequence[Selection], each: int) -> None:
        self._service, self.selections, self._each = service, selections, each
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._requests: list[Request] = []
        self._open = set(range(each * len(selections)))
        self.was_left = False

    @classmethod
    async def begin(cls, service: Service, body: Generation, prompts: int, read: Read) -> "Answers":
        """Admit a request, read it, find out what answers it, and hand it to the engine.

        Raises:
            ServingError: there is no room, it cannot be read, nothing of that name is served, or the engine refuses.
        """
        arrived = time.monotonic()
        if prompts * body.answers > service.config.limits.answers:
            raise ServingError(
                "too_many_answers",
                f"{prompts} prompts with {body.answers} answers each; at most {service.config.limits.answers} "
                "answers in one request",
            )
        with service.admission.admitted(prompts * body.answers):
            ids, sampling = await read()
            selections = await select(service, body, ids)
        answers = cls(service, selections, body.answers)
        answers._start(ids, sampling, arrived, streams=bool(body.stream))
        return answers

    def _start(self, prompts: list[list[int]], sampling: Sampling, arrived: float, *, streams: bool) -> None:
        deadline = arrived + self._service.config.limits.deadline_s
        for number in sorted(self._open):
            which, copy = divmod(number, self._each)
            request = Request(
                prompts[which],
                _seeded(sampling, copy),
                self.selections[which].route,
                self._emitter(number),
                arrived=arrived,
                deadline=deadline,
                streams=streams,
            )
            try:
                self._service.engine.submit(request)
            except ServingError:
                for unsent in range(number, len(prompts) * self._each):
                    self._close(unsent, None)
                self.cancel()
                raise
            self._requests.append(request)

    def cancel(self) -> None:
        """Drop what is not finished; nobody waits for it any more."""
        for request in self._requests:
            request.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Events with the numbers of their answers, until all have ended."""
        unfinished = len(self._requests)
        while unfinished:
            number, event = await self._events.get()
            unfinished -= isinstance(event, Finished | Failed)
            yield number, event

    def _emitter(self, number: int) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._take, number, event)
            except RuntimeError:  # the loop is closed: the server was made to stop while answers were in the making
                log.debug("an answer ended after the server")

        return emit

    def _take(self, number: int, event: Event) -> None:
        if isinstance(event, Finished | Failed):
            self._close(number, event)
        self._events.put_nowait((number, event))

    def _close(self, number: int, end: Finished | Failed | None) -> None:
        self._open.discard(number)
        selection = self.selections[number // self._each]
        if not any(other // self._each == number // self._each for other in self._open):
            selection.release()
        metrics, admission = self._service.metrics, self._service.admission
        if isinstance(end, Finished):
            metrics.note_answer(selection.metric_name, end)
            admission.leave(end.queued_s + end.prefill_s + end.decode_s)
        else:
            admission.leave()
            if end is not None:
                metrics.note_failure(selection.metric_name, end.code)


def failure(event: Failed) -> ServingError:
    """An answer that failed, as a refusal."""
    return ServingError(event.code, event.message, event.status)


def too_late(service: Service) -> ServingError:
    """An answer that was not whole in time, as a refusal."""
    limit = service.config.limits.deadline_s
    return ServingError("deadline_exceeded", f"the answer was not whole within {limit:g} s; ask for fewer tokens", 504)


@asynccontextmanager
async def cancelled_with_client(request: HttpRequest, answers: Answers) -> AsyncIterator[None]:
    """Drop the answers when the client leaves while this runs."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answers.was_left = True
        answers.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


def _seeded(sampling: Sampling, index: int) -> Sampling:
    """Answers to the same prompt differ, and repeat as a whole."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) % _SEEDS)
