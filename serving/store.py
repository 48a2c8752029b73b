"""Adapters by name: loaded, replaced, pinned and unloaded while requests run on them.

A name stands for one immutable generation at a time. Who leases a name keeps that generation, in memory, until the
lease is given back, whatever becomes of the name. Files are read by a few threads of their own; the lock is never held
meanwhile, so adapters that are in memory are leased at once.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..hub.remote import Remote
from .errors import ServingError
from .factors import FactorLayout, PackedLora
from .generations import Adapter, AdapterInfo, Generation, Held, Lease, mixed
from .loading import AdapterLoader
from .names import check_expected, check_name, exists, not_found
from .request import Route
from .sources import Sources
from .threads import compute_on_one_thread
from .tiers import HostMemory

T = TypeVar("T")

_MOST_PARTS = 16


@dataclass(frozen=True)
class StoreLimits:
    """How much a store may hold and do.

    Attributes:
        adapters, nbytes: in host memory at once.
        rank: of one adapter, and of a mix of several together.
        file_bytes: of one weights file.
        loaders: threads that read files.
        waiting_loads: adapters that may wait to be read; more are refused.
        load_s: seconds that a request waits for an adapter on disk, and a download may take.
    """

    adapters: int = 256
    nbytes: int = 4 << 30
    rank: int = 256
    file_bytes: int = 2 << 30
    loaders: int = 2
    waiting_loads: int = 256
    load_s: float = 60.0


class AdapterStore:
    """Holds adapters for one base. Every method may be called from any thread.

    Args:
        layout: of the linears that may be adapted.
        base_model, base_names: the transformers model, and what adapters may call it.
        roots: the only folders below which adapters are read.
        dtype: of the factors in memory.
        reserved: names that no adapter may have, such as those of the base and of hosted mixtures.
        hub: where adapters may also come from.
    """

    def __init__(
        self,
        layout: FactorLayout,
        base_model: nn.Module,
        base_names: Collection[str],
        roots: Iterable[Path],
        limits: StoreLimits | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        reserved: Collection[str] = (),
        hub: Remote | None = None,
    ) -> None:
        self.limits = limits or StoreLimits()
        self._reserved = {*base_names, *reserved}
        self._sources = Sources(roots, hub=hub, most_bytes=self.limits.file_bytes, download_s=self.limits.load_s)
        self._loader = AdapterLoader(
            layout, base_model, base_names, most_rank=self.limits.rank, most_bytes=self.limits.file_bytes, dtype=dtype
        )
        self._memory = HostMemory(self.limits.nbytes, self.limits.adapters)
        self._adapters: dict[str, Adapter] = {}
        self._listeners: list[Callable[[], None]] = []
        self._threads = ThreadPoolExecutor(self.limits.loaders, "adapter-loader", initializer=compute_on_one_thread)
        self._waiting = 0
        self._changed = threading.Condition()

    # ------------------------------------------------------------------ what is there

    def list(self) -> tuple[AdapterInfo, ...]:
        """All adapters, in the order they came."""
        with self._changed:
            return tuple(adapter.info for adapter in self._adapters.values())

    def names(self) -> set[str]:
        """Of the adapters that take requests."""
        with self._changed:
            return {name for name, adapter in self._adapters.items() if not adapter.leaving}

    def examples(self) -> dict[str, tuple[str, ...]]:
        """Of every adapter that takes requests, the prompts that tell what it is for."""
        with self._changed:
            return {name: adapter.prompts for name, adapter in self._adapters.items() if not adapter.leaving}

    def __contains__(self, name: str) -> bool:
        return name in self._adapters

    def held(self) -> Held:
        """What is in host memory, with what was replaced or unloaded and is still used."""
        with self._changed:
            return Held(len(self._memory), self._memory.nbytes)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every load, replacement and unloading; it must be quick."""
        self._listeners.append(listener)

    # ------------------------------------------------------------------ coming and going

    def load(
        self,
        name: str,
        source: str | Path,
        *,
        revision: str | None = None,
        expected_generation: str | None = None,
        pin: bool = False,
        prompts: Sequence[str] = (),
    ) -> AdapterInfo:
        """Read an adapter and serve it under `name`; where that name stands for these very files already, nothing
        happens.

        Args:
            source, revision: as for `Sources.find`.
            expected_generation: what the name stands for now, to replace it. Requests that run on it finish on it.
            pin: keep it in memory.
            prompts: examples of what it is for; a replacement keeps those it has where none are given.

        Raises:
            ServingError: `adapter_name_invalid`, `adapter_name_reserved`, `adapter_exists`, `adapter_not_found`,
                `generation_mismatch`, `adapter_unloading`, `adapter_load_busy`, `adapter_load_timeout`, and as
                `Sources.find`, `AdapterLoader.load`, `HostMemory.admit` and `pin`.
        """
        check_name(name, self._reserved)
        if expected_generation is not None:
            check_expected(name, self._read_once(name).generation.sha256, expected_generation)
        found = self._sources.find(str(source), revision)
        generation, lora = self._wait(self._submit(lambda: self._loader.load(found)), found.origin)
        with self._changed:
            if pin:
                self._check_pins(name)
            adapter = self._put(name, generation, lora, expected_generation)
            adapter.prompts = tuple(prompts) or adapter.prompts
            adapter.generation.pinned |= pin
            info = adapter.info
        self._tell()
        return info

    def replace(
        self,
        name: str,
        source: str | Path,
        *,
        expected_generation: str,
        revision: str | None = None,
        prompts: Sequence[str] = (),
    ) -> AdapterInfo:
        """Let a name stand for other files from now on, if it stands for `expected_generation`; raises as `load`."""
        return self.load(name, source, revision=revision, expected_generation=expected_generation, prompts=prompts)

    def register(self, name: str, folder: Path, prompts: Sequence[str] = ()) -> AdapterInfo:
        """Serve an adapter that stays on disk until it is asked for; of its weights only the header is read.

        Raises:
            ServingError: as `load`.
        """
        check_name(name, self._reserved)
        generation = self._loader.check(self._sources.find(str(folder.absolute())))
        with self._changed:
            if name in self._adapters:
                raise exists(name)
            adapter = self._adapters[name] = Adapter(name, generation, tuple(prompts))
            info = adapter.info
        self._tell()
        return info

    def unload(self, name: str, *, force: bool = False, timeout_s: float = 30.0) -> None:
        """Forget a name. New requests are refused at once; those in flight are waited for.

        Args:
            force: do not wait. Requests in flight still finish as they began: what they lease stays in memory.
            timeout_s: seconds to wait, after which the adapter is served as before.

        Raises:
            ServingError: `adapter_not_found`, `adapter_unloading`, or `adapter_busy` when the time was up.
        """
        with self._changed:
            adapter = self._known(name)
            if not force:
                self._check_stays(adapter)
                self._wait_until_free(adapter, timeout_s)
            if self._adapters.get(name) is adapter:
                del self._adapters[name]
                self._retire(adapter.generation)
            self._changed.notify_all()
        self._tell()

    def pin(self, name: str, pinned: bool = True) -> AdapterInfo:
        """Keep an adapter in memory, or no longer; one on disk is read first.

        Raises:
            ServingError: `pin_limit_exceeded`, and as `lease`.
        """
        with self.lease(name) if pinned else nullcontext(), self._changed:
            adapter = self._takes_requests(name)
            if pinned:
                self._check_pins(name)
            adapter.generation.pinned = pinned
            return adapter.info

    def close(self) -> None:
        """Read nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ use

    def lease(self, name: str) -> Lease:
        """An adapter for one request; one on disk is read first, by one thread for all who wait for it.

        Where all memory is in use, this waits until a request ends.

        Raises:
            ServingError: `adapter_not_found`, `adapter_unloading`, `adapter_load_busy`, `adapter_load_timeout`,
                `adapter_memory_full`, `out_of_memory`; `adapter_files_gone`, `adapter_files_changed` or a code of
                `AdapterLoader.load` when its files are no more what they were. The adapter stays known.
        """
        return self._leased_until(name, time.monotonic() + self.limits.load_s)

    def lease_now(self, name: str) -> Lease | None:
        """An adapter that is in memory, without waiting for anything; None where it must be read first.

        Raises:
            ServingError: `adapter_not_found`, `adapter_unloading`.
        """
        with self._changed:
            adapter = self._takes_requests(name)
            generation = adapter.generation
            if generation.lora is None:
                return None
            self._hold(adapter, generation)
        return self._lease(adapter, generation)

    def mix(self, weights: Mapping[str, float]) -> Lease:
        """A weighted sum of adapters for one request.

        Raises:
            ServingError: `mix_invalid`, `rank_limit_exceeded`, and as `lease`.
        """
        if not 1 <= len(weights) <= _MOST_PARTS or not all(map(math.isfinite, weights.values())):
            raise ServingError(
                "mix_invalid", f"a mix has 1 to {_MOST_PARTS} adapters with finite weights, got {len(weights)}"
            )
        with ExitStack() as held:  # who holds some waits for none
            leases = [held.enter_context(self._leased_until(name, 0.0)) for name in weights]
            routes = [lease.route for lease in leases]
            route = mixed(list(zip(routes, map(float, weights.values()), strict=True)), self.limits.rank)
            return Lease(route, tuple(lease.info for lease in leases), held.pop_all().close)

    # ------------------------------------------------------------------ inside: names

    def _known(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise not_found(name)
        return self._adapters[name]

    def _takes_requests(self, name: str) -> Adapter:
        adapter = self._known(name)
        self._check_stays(adapter)
        return adapter

    def _check_stays(self, adapter: Adapter) -> None:
        if adapter.leaving:
            raise ServingError("adapter_unloading", f"{adapter.name!r} is being unloaded; it takes no requests", 409)

    def _read_once(self, name: str) -> Adapter:
        """An adapter whose generation is known, for which its files may have to be read a first time."""
        with self._changed:
            adapter = self._takes_requests(name)
        if adapter.generation.sha256 is None:
            self.lease(name).release()
        return adapter

    def _put(self, name: str, generation: Generation, lora: PackedLora, expected: str | None) -> Adapter:
        """Let a name stand for a generation that was just read."""
        adapter = self._takes_requests(name) if expected is not None or name in self._adapters else None
        if adapter is None:
            self._memory.admit(generation, lora)
            adapter = self._adapters[name] = Adapter(name, generation)
            return adapter
        own = adapter.generation
        if expected is not None:
            check_expected(name, own.sha256, expected)
        elif not (
            own.sha256 == generation.sha256 or (own.sha256 is None and own.found.folder == generation.found.folder)
        ):
            raise exists(name)
        if own.sha256 == generation.sha256:
            own.found = generation.found
            self._memory.admit(own, lora)
        else:
            self._memory.admit(generation, lora)
            generation.pinned = own.pinned
            self._retire(own)
            adapter.generation = generation
        return adapter

    def _check_pins(self, name: str) -> None:
        others = sum(adapter.generation.pinned for adapter in self._adapters.values() if adapter.name != name)
        if others + 1 >= self._memory.most_adapters:
            raise ServingError(
                "pin_limit_exceeded",
                f"{name!r} cannot be pinned: {others} adapters are, and one place of {self._memory.most_adapters} must "
                "be left for all others",
                409,
            )

    def _retire(self, generation: Generation) -> None:
        generation.retired, generation.pinned = True, False
        if not generation.leases:
            self._memory.drop(generation)

    def _wait_until_free(self, adapter: Adapter, timeout_s: float) -> None:
        adapter.leaving = True
        if not self._changed.wait_for(lambda: not adapter.leases or adapter.generation.retired, timeout_s):
            adapter.leaving = False
            raise ServingError(
                "adapter_busy",
                f"{adapter.name!r} is still used by {adapter.leases} requests after {timeout_s:g} s; it is served as "
                "before. Wait, or unload it by force: they finish all the same",
                409,
            )

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    # ------------------------------------------------------------------ inside: leases

    def _hold(self, adapter: Adapter, generation: Generation) -> None:
        adapter.leases += 1
        generation.leases += 1

    def _let_go(self, adapter: Adapter, generation: Generation) -> None:
        with self._changed:
            adapter.leases -= 1
            generation.leases -= 1
            if generation.retired and not generation.leases:
                self._memory.drop(generation)
            self._changed.notify_all()

    def _lease(self, adapter: Adapter, generation: Generation) -> Lease:
        """The lease of a generation that is held, and in memory."""
        with self._changed:
            lora, sha256 = generation.lora, generation.sha256
            assert lora is not None
            assert sha256 is not None
            self._memory.touch(generation)
            info = adapter.info
        route = Route(adapter.name, sha256, ((lora, 1.0),))
        return Lease(route, (info,), lambda: self._let_go(adapter, generation))

    # ------------------------------------------------------------------ inside: reading

    def _leased_until(self, name: str, until: float) -> Lease:
        while True:
            with self._changed:
                adapter = self._takes_requests(name)
                generation = adapter.generation
                self._hold(adapter, generation)
            try:
                self._bring(generation)
                return self._lease(adapter, generation)
            except BaseException as error:
                self._let_go(adapter, generation)
                if not (isinstance(error, ServingError) and self._may_succeed_now(error, generation, until)):
                    raise

    def _may_succeed_now(self, error: ServingError, generation: Generation, until: float) -> bool:
        """Whether to try again: it was replaced while it was read, or others gave memory back meanwhile."""
        if generation.retired:
            return True
        if error.code != "adapter_memory_full":
            return False
        with self._changed:
            return self._changed.wait_for(lambda: self._memory.has_room(generation.nbytes), until - time.monotonic())

    def _bring(self, generation: Generation) -> None:
        """Wait until a generation that is held is in memory."""
        with self._changed:
            if generation.lora is not None:
                return
            if generation.loading is None:
                self._memory.check_room(generation.nbytes)
                generation.loading = self._submit(lambda: self._read_again(generation))
            loading = generation.loading
        self._wait(loading, generation.found.origin)

    def _read_again(self, generation: Generation) -> None:
        try:
            fresh, lora = self._loader.load_again(generation)
            with self._changed:
                generation.sha256 = fresh.sha256
                generation.rank, generation.nbytes, generation.modules = fresh.rank, fresh.nbytes, fresh.modules
                if generation.leases or not generation.retired:
                    self._memory.admit(generation, lora)
        finally:
            with self._changed:
                generation.loading = None

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        with self._changed:
            if self._waiting >= self.limits.waiting_loads + self.limits.loaders:
                raise ServingError("adapter_load_busy", f"{self._waiting} adapters wait to be read; try again", 429)
            self._waiting += 1
        future = self._threads.submit(work)
        future.add_done_callback(lambda _: self._done())
        return future

    def _done(self) -> None:
        with self._changed:
            self._waiting -= 1

    def _wait(self, future: Future[T], origin: str) -> T:
        try:
            return future.result(self.limits.load_s)
        except TimeoutError:
            raise ServingError(
                "adapter_load_timeout", f"{origin}: not read within {self.limits.load_s:g} s; try again", 504
            ) from None
