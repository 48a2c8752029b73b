"""What stands before the replicas, by itself: whatever becomes of a replica, every answer ends once; names and
generations follow the rules of one server. And a replica, by itself."""

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra loramux[ray] is not installed")

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import RequestCancelledError
from serving_cases import PROMPT, stock_text, write_loras

from loramux.serving.config import ServeConfig
from loramux.serving.errors import ServingError
from loramux.serving.generations import AdapterInfo
from loramux.serving.replicas.app import build, opened
from loramux.serving.replicas.front import RemoteEngine, RemoteStore
from loramux.serving.replicas.replica import BaseFacts, Replica
from loramux.serving.request import BASE, Chunk, Event, Failed, Finished, Request, Sampling
from loramux.support.config import parse, to_data
from loramux.support.errors import ConfigError

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


# ---------------------------------------------------------------------- names and generations


class Examined:
    """A handle of replicas that find, whatever they examine, an adapter whose generation is called as its source."""

    @property
    def examine(self) -> "Examined":
        return self

    def remote(self, source: str, revision: str | None) -> "Examined":
        self._found = AdapterInfo("", source, source, revision, 4, 2, 100, "memory", False, 0)
        return self

    def result(self) -> AdapterInfo:
        return self._found


@pytest.fixture
def store() -> RemoteStore:
    store = RemoteStore(Examined(), reserved=("tiny",))
    store.load("red", "abc")
    return store


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda store: store.load("../nasty name\n", "abc"), "adapter_name_invalid", "an adapter cannot be called"),
        (lambda store: store.load("tiny", "abc"), "adapter_name_reserved", "'tiny' stands for something else here"),
        (lambda store: store.load("auto", "abc"), "adapter_name_reserved", "'auto' stands for something else here"),
        (lambda store: store.load("red", "other"), "adapter_exists", "'red' stands for other files already"),
        (lambda store: store.load("red", "abc", pin=True), "pin_unsupported", "adapters are not pinned over replicas"),
        (lambda store: store.pin("red", True), "pin_unsupported", "adapters are not pinned over replicas"),
        (
            lambda store: store.replace("red", "new", expected_generation="older"),
            "generation_mismatch",
            "'red' stands for generation abc, not older",
        ),
        (lambda store: store.replace("rad", "new", expected_generation="abc"), "adapter_not_found", "no adapter"),
        (lambda store: store.lease("rad"), "adapter_not_found", "no adapter 'rad' is served here"),
        (lambda store: store.unload("rad"), "adapter_not_found", "no adapter 'rad' is served here"),
    ],
)  # fmt: skip
def test_the_front_refuses_what_one_server_refuses(store, change, code, message):
    with pytest.raises(ServingError, match=message) as caught:
        change(store)
    assert caught.value.code == code
    assert [(info.name, info.generation) for info in store.list()] == [("red", "abc")]


def test_the_generation_of_an_answer_is_the_one_that_is_listed(store):
    assert store.lease("red").route.weights == store.list()[0].generation
    store.load("green", "def")
    mixed = store.mix({"red": 0.5, "green": -1})
    assert (mixed.route.name, mixed.route.weights) == ("red+green", "abc*0.5+def*-1.0")


def test_the_front_says_nothing_of_memory_that_is_elsewhere(store):
    assert store.held() is None


# ---------------------------------------------------------------------- the settings of `serve run`


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replica": "4"}, "serve run: replica: unknown key; did you mean 'replicas'"),
        ({"replicas": "none"}, "serve run: replicas: Input should be a valid integer"),
        ({}, "other machines can reach this server: give api_keys_file"),
    ],
)
def test_arguments_that_are_wrong_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(arguments)


def test_a_run_brings_its_base_and_its_dtype(finished_job: Path):
    config, places = opened(parse(ServeConfig, {"runs": [str(finished_job)]}, where="settings"))
    assert (config.base, config.dtype) == (str(finished_job.parent / "base"), "float32")
    assert [place.root for place in places] == [finished_job / "exports"]
    with pytest.raises(ConfigError, match="base: the runs bring theirs"):
        opened(parse(ServeConfig, {"runs": [str(finished_job)], "base": "loramux/tiny"}, where="settings"))


# ---------------------------------------------------------------------- one replica


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_loras(tmp_path_factory.mktemp("loras"), "red")


@pytest.fixture
def replica(loras: Path) -> Replica:
    return Replica(to_data(ServeConfig(base="loramux/tiny", roots=(loras,))))


def answered(replica: Replica, age_s: float, seconds: float) -> list[Event]:
    async def ask() -> list[Event]:
        prompt = replica._service.tokenizer(PROMPT)["input_ids"]
        sampling = Sampling(max_tokens=8, temperature=0.0)
        return [event async for event in replica.answer(prompt, sampling, "base", (), age_s, seconds, False)]

    return asyncio.run(ask())


def test_a_replica_counts_the_time_from_when_the_front_was_asked(replica):
    *chunks, end = answered(replica, age_s=2.0, seconds=60.0)
    assert "".join(chunk.text for chunk in chunks) == stock_text(None)
    assert isinstance(end, Finished)
    assert end.queued_s >= 2
    *_, late = answered(replica, age_s=2.0, seconds=-1.0)
    assert isinstance(late, Finished)
    assert late.reason == "deadline"


def test_ray_is_told_when_the_engine_of_a_replica_has_died(replica):
    replica.check_health()
    replica._engine.stop(drain=False, timeout_s=10)
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        replica.check_health()
