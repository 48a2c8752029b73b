"""Which examples of which tasks make up the batch of a step: a pure function of seed and step.

Nothing is consumed, so nothing has to be saved: any process can ask for any step, and a resumed run asks for the next.

Let `p_t` be the share of task t. Its j-th example (j = 0, 1, ...) is due at virtual time (j + 1/2) / p_t; examples are
served in the order in which they are due. After any number of examples every task therefore has its share to within
about one example, and how many each had can be computed without walking there (it is Webster's apportionment).
"""

import heapq
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import numpy as np

from ..support.config import config
from ..support.errors import ConfigError, did_you_mean

Batch = list[tuple[int, int]]
# Shares are counted in whole units of 2**-40, so that who is due next never hangs on a rounding error.
_UNITS = 1 << 40
_PERMUTE, _SHUFFLE = 0, 1
_MOST_MEASURED = 20_000


@config
class MixtureConfig:
    """How often each task is seen."""

    strategy: Literal["proportional", "temperature", "weights"] = "proportional"
    """proportional: min(size, cap); temperature: that to the power 1/temperature; weights: as given."""
    cap: int | None = None
    """A task counts as at most this many examples (Raffel et al. 2020, section 3.5.2); all of them are still seen."""
    temperature: float = 1.0
    """1 is proportional, large values approach equal shares."""
    weights: dict[str, float] | None = None
    """Share of each task, in any unit; 0 leaves one out."""
    bucket_by_length: bool = True
    """Batch examples of similar length within every window of `window` steps."""
    window: int = 16
    """Steps that are drawn together; more of them waste less padding and mix lengths less. Fewer are used where a task
    is so small that it would come round more than once in a window, which would put copies into one batch."""

    def __post_init__(self) -> None:
        if self.cap is not None and self.cap < 1:
            raise ConfigError(f"cap={self.cap} must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be above 0 and finite")
        if self.window < 1:
            raise ConfigError(f"window={self.window} must be at least 1")
        if (self.weights is not None) != (self.strategy == "weights"):
            raise ConfigError("`weights` and `strategy: weights` need each other")
        if self.temperature != 1 and self.strategy != "temperature":
            raise ConfigError(f"temperature={self.temperature} needs `strategy: temperature`")


class Mixture:
    """The batches of a run.

    Within a task examples come without replacement, newly shuffled on every pass over it.

    Args:
        lengths: for every task the number of tokens of each training example.
        batch_size: examples per optimiser step, over all processes and accumulation steps.

    Raises:
        ConfigError: when weights are missing, negative, all zero or name an unknown task; when the batch is empty.
    """

    def __init__(
        self,
        lengths: Mapping[str, Sequence[int]],
        config: MixtureConfig | None = None,
        *,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        for name, task in lengths.items():
            if not len(task):
                raise ConfigError(f"task {name!r} has no training examples")
        self.config = config or MixtureConfig()
        self.names = tuple(lengths)
        self.lengths = [np.asarray(task, dtype=np.int64) for task in lengths.values()]
        self.batch_size, self.seed = batch_size, seed
        self.shares = _shares(self.names, [len(task) for task in self.lengths], self.config)
        self.window = self._window_steps()
        self._units = [round(share * _UNITS) for share in self.shares]
        self._drawn = lru_cache(maxsize=2)(self._draw_window)
        self._order = lru_cache(maxsize=2 * len(self.names))(self._shuffled)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that draw as many examples as all tasks have together (each counted up to the cap)."""
        cap = self.config.cap or max(len(task) for task in self.lengths)
        return -(-sum(min(len(task), cap) for task in self.lengths) // self.batch_size)

    def batch(self, step: int) -> Batch:
        """The global batch of a step as (task index, example index) pairs."""
        window, offset = divmod(step, self.window)
        return list(self._drawn(window)[offset])

    def padding_waste(self, parts: int = 1) -> float:
        """The share of padding among all positions, over the first steps (an epoch, at most about 20,000 examples).

        Args:
            parts: micro-batches of a step, over all processes; each is padded to its own longest example.
        """
        used = padded = 0
        for step in range(min(self.steps_per_epoch, 1 + _MOST_MEASURED // self.batch_size)):
            lengths = [int(self.lengths[task][example]) for task, example in self.batch(step)]
            used += sum(lengths)
            padded += sum(max(piece) * len(piece) for part in range(parts) if (piece := lengths[part::parts]))
        return 1 - used / padded

    def _window_steps(self) -> int:
        per_step = (share * self.batch_size for share in self.shares)
        passes = [len(task) / drawn for task, drawn in zip(self.lengths, per_step, strict=True) if drawn]
        return max(1, min(self.config.window, int(min(passes))))

    def _draw_window(self, window: int) -> list[Batch]:
        size = self.window * self.batch_size
        before, after = (_counts(self._units, size * w) for w in (window, window + 1))
        drawn = [
            (task, self._example(task, draw))
            for task in range(len(self.names))
            for draw in range(before[task], after[task])
        ]
        rng = np.random.default_rng([self.seed, _SHUFFLE, window])
        drawn = [drawn[i] for i in rng.permutation(size)]
        if not self.config.bucket_by_length:
            return _cut(drawn, self.batch_size)
        batches = _cut(sorted(drawn, key=lambda pair: self.lengths[pair[0]][pair[1]]), self.batch_size)
        return [batches[i] for i in rng.permutation(len(batches))]

    def _example(self, task: int, draw: int) -> int:
        turn, position = divmod(draw, len(self.lengths[task]))
        return int(self._order(task, turn)[position])

    def _shuffled(self, task: int, turn: int) -> np.ndarray:
        """The order of a task's examples on one pass over it."""
        return np.random.default_rng([self.seed, _PERMUTE, task, turn]).permutation(len(self.lengths[task]))


def _cut(drawn: Batch, size: int) -> list[Batch]:
    return [drawn[i : i + size] for i in range(0, len(drawn), size)]


def _counts(units: Sequence[int], total: int) -> list[int]:
    """How many of the first `total` draws each task has, by Webster's method in whole numbers."""
    whole = sum(units)
    # Up to this virtual time no more than `total` draws are due, and at most one per task is missing.
    time = max(Fraction(0), total - Fraction(len(units), 2))
    counts = [int(time * unit / whole + Fraction(1, 2)) for unit in units]
    due = [(_due(counts[t], unit), t) for t, unit in enumerate(units) if unit]
    heapq.heapify(due)
    for _ in range(total - sum(counts)):
        _, task = due[0]
        counts[task] += 1
        heapq.heapreplace(due, (_due(counts[task], units[task]), task))
    return counts


def _due(count: int, unit: int) -> Fraction:
    return Fraction(2 * count + 1, 2 * unit)


def _shares(names: Sequence[str], sizes: Sequence[int], config: MixtureConfig) -> list[float]:
    if config.weights is not None:
        raw = _given(names, config.weights)
    else:
        raw = [min(size, config.cap or size) ** (1 / config.temperature) for size in sizes]
    return [value / sum(raw) for value in raw]


def _given(names: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    for name, weight in weights.items():
        if name not in names:
            raise ConfigError(f"mixture weights: unknown task {name!r}; {did_you_mean(name, names)}")
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"mixture weights: {name}={weight} must be 0 or more, and finite")
    missing = [name for name in names if name not in weights]
    if missing:
        raise ConfigError(f"mixture weights: none for {', '.join(missing)}; give 0 to leave a task out")
    if not any(weights.values()):
        raise ConfigError("mixture weights: all are 0")
    return [weights[name] for name in names]
