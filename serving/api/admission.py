"""Who may come in: answers in the making are counted, the queue is bounded, and a server that drains takes no more."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ServingError

_LONGEST_RETRY_S = 60
_REMEMBERED = 64


class Admission:
    """Counts answers in the making. Lives on the event loop.

    Args:
        slots: answers made side by side.
        queue: answers that may wait besides.
    """

    def __init__(self, slots: int, queue: int) -> None:
        self._slots, self._capacity = slots, slots + queue
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self.in_flight = 0
        self.is_draining = False

    def take(self, answers: int) -> None:
        """Admit a request of so many answers; `leave` is owed for each.

        Raises:
            ServingError: 503 while draining, 429 where the queue has no room, 400 where it never will have.
        """
        if self.is_draining:
            raise ServingError("shutting_down", "the server is shutting down; ask another one, or later", 503)
        if answers > self._capacity:
            raise ServingError(
                "too_many_answers",
                f"this request wants {answers} answers, and there is room for {self._capacity} in all",
            )
        if self.in_flight + answers > self._capacity:
            raise ServingError(
                "queue_full",
                f"{self.in_flight} answers are being made or wait, and there is room for {self._capacity}; "
                f"this request wants {answers}; try again later",
                429,
            )
        self.in_flight += answers

    @contextmanager
    def admitted(self, answers: int) -> Iterator[None]:
        """Admit a request before what comes first is done for it; where that fails, its places are free again.

        Raises:
            ServingError: as `take`.
        """
        self.take(answers)
        try:
            yield
        except BaseException:
            for _ in range(answers):
                self.leave()
            raise

    def leave(self, seconds: float | None = None) -> None:
        """One answer less; `seconds` is how long it took, where it was made at all."""
        self.in_flight -= 1
        if seconds is not None:
            self._seconds.append(seconds)

    def retry_after(self) -> int:
        """Seconds until there should be room again."""
        if not self._seconds:
            return 1
        mean = sum(self._seconds) / len(self._seconds)
        return min(max(math.ceil(mean * self.in_flight / self._slots), 1), _LONGEST_RETRY_S)
