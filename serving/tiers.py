"""The middle tier: adapters in host memory, between the engine's slots above and the disk below."""

from collections import OrderedDict

from .errors import ServingError
from .factors import PackedLora
from .generations import Generation


class HostMemory:
    """Generations in memory, the least recently used first. The store that owns it keeps it to one thread at a time.

    Args:
        most_bytes, most_adapters: what may be there at once; pinned and leased generations are never sent away.
    """

    def __init__(self, most_bytes: int, most_adapters: int) -> None:
        self.most_bytes, self.most_adapters = most_bytes, most_adapters
        self.nbytes = 0
        self._held: OrderedDict[Generation, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def touch(self, generation: Generation) -> None:
        """It was used just now."""
        self._held.move_to_end(generation)

    def check_room(self, nbytes: int) -> None:
        """Whether there is room, or would be if others left.

        Raises:
            ServingError: `adapter_too_large` for any memory of this size, else `adapter_memory_full`.
        """
        if nbytes > self.most_bytes:
            raise ServingError(
                "adapter_too_large", f"{nbytes} bytes in memory; all adapters together have {self.most_bytes}", 413
            )
        if not self.has_room(nbytes):
            staying = sum(not _may_leave(generation) for generation in self._held)
            raise ServingError(
                "adapter_memory_full",
                f"{staying} adapters are in use or pinned, and no memory is left for {nbytes} bytes more; try again, "
                "unpin some, or give adapters more memory",
                503,
            )

    def has_room(self, nbytes: int) -> bool:
        """Whether those that must stay leave room."""
        staying = [generation for generation in self._held if not _may_leave(generation)]
        return sum(g.nbytes for g in staying) + nbytes <= self.most_bytes and len(staying) < self.most_adapters

    def admit(self, generation: Generation, lora: PackedLora) -> None:
        """Take factors in; others leave for them where they must.

        Raises:
            ServingError: as `check_room`.
        """
        if generation in self._held:
            return
        self.check_room(generation.nbytes)
        leaving = (other for other in list(self._held) if _may_leave(other))
        while self.nbytes + generation.nbytes > self.most_bytes or len(self._held) >= self.most_adapters:
            self.drop(next(leaving))
        generation.lora = lora
        self._held[generation] = None
        self.nbytes += generation.nbytes

    def drop(self, generation: Generation) -> None:
        """Its factors leave, if they are there."""
        if generation in self._held:
            del self._held[generation]
            self.nbytes -= generation.nbytes
            generation.lora = None


def _may_leave(generation: Generation) -> bool:
    return not (generation.leases or generation.pinned)
