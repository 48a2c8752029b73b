"""A queue in which no name waits for another name's crowd (start-time fair queueing, Goyal et al. 1996)."""

import heapq
from collections import Counter
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items come out so that every waiting name gets an equal share of the cost, and in order within a name."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str, T]] = []
        self._finish: dict[str, float] = {}
        self._now = 0.0
        self._arrivals = 0
        self.waiting: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[T]:
        """All that wait, in no order."""
        return (item for _, _, _, item in self._heap)

    def push(self, name: str, cost: float, item: T) -> None:
        start = max(self._now, self._finish.get(name, 0.0))
        self._finish[name] = start + cost
        heapq.heappush(self._heap, (start, self._arrivals, name, item))
        self._arrivals += 1
        self.waiting[name] += 1

    def peek(self) -> T:
        return self._heap[0][3]

    def pop(self) -> T:
        self._now, _, name, item = heapq.heappop(self._heap)
        self._leave(name)
        return item

    def remove(self, items: set[T]) -> None:
        for _, _, name, item in self._heap:
            if item in items:
                self._leave(name)
        self._heap = [entry for entry in self._heap if entry[3] not in items]
        heapq.heapify(self._heap)

    def _leave(self, name: str) -> None:
        self.waiting[name] -= 1
        if not self.waiting[name]:
            del self.waiting[name]
            self._finish = {other: at for other, at in self._finish.items() if at > self._now}
