"""What the routes share: the parts behind them, the base's text, and who may come in."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from ..config import ServeConfig
from ..keys import Keys
from ..metrics import MIX, Gauges, Metrics
from ..ports import Chooser, Engine, Store
from .admission import Admission

T = TypeVar("T")
_STORE_THREADS, _CHANGE_THREADS = 16, 4
_SHORT = 4096


@dataclass
class Service:
    """Everything that is served.

    Attributes:
        base: the name of the base, which adapters have as their parent.
        vocabulary: how many tokens the base knows.
        mixtures: hosted mixtures, each with the tasks one of which a request has to name.
        chooser: the automatic choice, where there is one.
    """

    config: ServeConfig
    engine: Engine
    store: Store
    tokenizer: Any
    base: str
    vocabulary: int
    keys: Keys
    mixtures: Mapping[str, Sequence[str]] = field(default_factory=dict)
    chooser: Chooser | None = None

    def __post_init__(self) -> None:
        self.started = int(time.time())
        self.at_close: list[Callable[[], None]] = []
        self.admission = Admission(self.config.memory.slots, self.config.limits.queue)
        self.metrics = Metrics(self.gauges, self.serves, self.config.limits.adapter_labels)
        self._store_threads = ThreadPoolExecutor(_STORE_THREADS, "loramux-store")
        self._change_threads = ThreadPoolExecutor(_CHANGE_THREADS, "loramux-changes")
        self._text_thread = ThreadPoolExecutor(1, "loramux-text")

    @property
    def base_names(self) -> tuple[str, ...]:
        return (self.base, "base")

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    async def with_store(self, work: Callable[[], T]) -> T:
        """Run something that may read from disk, or wait, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._store_threads, work)

    async def with_changes(self, work: Callable[[], T]) -> T:
        """Run what an administrator wants of the store, which must not wait behind clients who wait for the disk."""
        return await asyncio.get_running_loop().run_in_executor(self._change_threads, work)

    async def with_text(self, work: Callable[[], T], characters: int) -> T:
        """Run something that tokenises so many characters; few are done before another thread would begin."""
        if characters <= _SHORT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, work)

    def prompt_limit(self) -> int:
        """Tokens that a prompt may have."""
        return min(self.config.limits.prompt_tokens or self.engine.max_length, self.engine.max_length - 1)

    def gauges(self) -> Gauges:
        """What there is at the moment, for the metrics."""
        stats = self.engine.stats()
        queue: dict[str, float] = {}
        for name, waiting in stats.waiting_by_name.items():
            label = self.metrics.label(MIX if "+" in name else name)
            queue[label] = queue.get(label, 0) + waiting
        held = self.store.held()
        memory: Gauges = {}
        if held is not None:
            memory["adapters_in_memory"] = ("Adapters in host memory", None, {"": held.adapters})
            memory["adapter_bytes"] = ("Host memory of adapters", None, {"": held.nbytes})
        return {
            "answers_running": ("Answers in slots", None, {"": stats.running + stats.prefilling}),
            "answers_waiting": ("Answers that wait for a slot, by adapter", "adapter", queue),
            "slots": ("Slots for answers", None, {"": self.config.memory.slots}),
            "cache_tokens": ("Tokens that running answers may come to need", None, {"": stats.cache_tokens}),
            "prefix_bytes": ("Keys and values kept of finished answers", None, {"": stats.prefix_bytes}),
            "adapters": ("Adapters that are served", None, {"": len(self.store.list())}),
            **memory,
        }

    def serves(self, name: str) -> bool:
        """Whether something answers under this name, which metrics are told of."""
        return name in ("base", MIX) or name in self.mixtures or name in self.store

    def close(self) -> None:
        for close in self.at_close:
            close()
        self._store_threads.shutdown(wait=False)
        self._change_threads.shutdown(wait=False)
        self._text_thread.shutdown(wait=False)


async def service_of(request: Request) -> Service:
    """The service behind a request, as a dependency of its route."""
    return request.app.state.service
