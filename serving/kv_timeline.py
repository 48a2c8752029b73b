"""Keys and values of a batch whose rows come and go, under transformers' own model code.

All rows share one timeline of columns and end at the same one, so a step writes one column for everybody, and a row
that joins is laid so that it ends where the others do. Distances between tokens are true, as sliding windows want.
What lies before a row's start is zero: masked or not, what another request left there must never reach it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ..adapters.prompt import text_config
from ..support.errors import ConfigError

KeysAndValues = list[tuple[Tensor, Tensor]]
"""By layer, the keys and values of one row, `(heads, tokens, head size)`."""

_FEWEST_ROWS, _FEWEST_COLUMNS = 4, 128


def check_cache(model: Any) -> None:
    """Raise ConfigError for a model that keeps more than the keys and values of its tokens."""
    for layer in DynamicCache(config=text_config(model)).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ConfigError(
                f"a {type(model).__name__} cannot be served: its layers keep a {type(layer).__name__}, and only keys "
                "and values of tokens can be batched here"
            )


class KvTimeline:
    """The cache of a batch.

    Args:
        layers: of the model.
        starts: the column at which each row begins.
        end: the column after the last that is filled. What lies before it is zero until `fill` says otherwise.
        columns: room to begin with.
    """

    def __init__(
        self, layers: int, starts: list[int] | None = None, end: int = 0, columns: int = _FEWEST_COLUMNS
    ) -> None:
        self.starts: list[int] = starts or []
        self.end = end
        self.held_rows = len(self.starts) or _FEWEST_ROWS
        self.held_columns = columns
        self._layers = [_Layer(self) for _ in range(layers)]
        self._cache = Cache(layers=list(self._layers))

    @property
    def first(self) -> int:
        """The first column that any row needs."""
        return min(self.starts, default=self.end)

    @property
    def columns(self) -> int:
        """How many columns the longest row has."""
        return self.end - self.first

    def inputs(self, new: int) -> dict[str, Tensor | Cache]:
        """What a forward pass over `new` tokens per row takes beside them; makes room for their keys and values."""
        if self.end + new > self.held_columns:
            self._move(self.columns, columns=max(self.held_columns, 2 * (self.columns + new)))
        starts = torch.tensor(self.starts).unsqueeze(1)
        columns = torch.arange(self.first, self.end + new)
        positions = (columns[-new:] - starts).clamp(min=0)
        return {"attention_mask": columns >= starts, "position_ids": positions, "past_key_values": self._cache}

    def advance(self, new: int) -> None:
        """A forward pass has filled so many columns."""
        self.end += new

    def join(self, other: "KvTimeline", row: int) -> None:
        """Take a row of another timeline over as the last row here."""
        length = other.end - other.starts[row]
        if not self.starts and length <= self.held_columns:
            self.end = length
        if length > self.end:
            self._move(length, columns=max(self.held_columns, 2 * length))
        if len(self.starts) == self.held_rows:
            self.held_rows *= 2
            self._move(self.end, columns=self.held_columns)
        self.starts.append(self.end - length)
        self.fill(len(self.starts) - 1, other.read(row))

    def remove(self, row: int) -> None:
        """Drop a row; the last one takes its place."""
        for layer in self._layers:
            layer.drop(row, len(self.starts) - 1, self.first, self.end)
        last = self.starts.pop()
        if row < len(self.starts):
            self.starts[row] = last

    def read(self, row: int) -> KeysAndValues:
        """What is kept of a row; views, which the next step may change."""
        return [layer.read(row, self.starts[row], self.end) for layer in self._layers]

    def fill(self, row: int, kept: KeysAndValues) -> None:
        """Fill the first columns of a row."""
        for layer, pair in zip(self._layers, kept, strict=True):
            layer.write(row, self.starts[row], pair)

    def _move(self, end: int, *, columns: int) -> None:
        """Let all rows end at column `end`, in buffers of so many columns."""
        first, last, shift = self.first, self.end, end - self.end
        self.held_columns = columns
        for layer in self._layers:
            layer.move(len(self.starts), first, last, first + shift)
        self.starts = [start + shift for start in self.starts]
        self.end = end


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, `(rows, heads, columns, head size)`, of the sizes the timeline holds."""

    is_sliding = False

    def __init__(self, timeline: KvTimeline) -> None:
        super().__init__()
        self._timeline = timeline
        self._pair: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers, for rows like `(heads, tokens, head size)`."""
        rows, columns = self._timeline.held_rows, self._timeline.held_columns
        self._pair = tuple(  # type: ignore[assignment]
            like.new_zeros(rows, like.shape[0], columns, like.shape[2]) for like in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._pair is None:
            self.lazy_initialization(key_states[0], value_states[0])
        assert self._pair is not None
        timeline = self._timeline
        rows, start, end = len(key_states), timeline.end, timeline.end + key_states.shape[2]
        for buffer, new in zip(self._pair, (key_states, value_states), strict=True):
            buffer[:rows, :, start:end] = new
        keys, values = (buffer[:rows, :, timeline.first : end] for buffer in self._pair)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._timeline.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self._timeline.columns

    def get_max_length(self) -> int:
        return -1

    def read(self, row: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        assert self._pair is not None
        keys, values = (buffer[row, :, first:end] for buffer in self._pair)
        return keys, values

    def write(self, row: int, first: int, pair: tuple[Tensor, Tensor]) -> None:
        if self._pair is None:
            self.lazy_initialization(*pair)
        assert self._pair is not None
        for buffer, part in zip(self._pair, pair, strict=True):
            buffer[row, :, first : first + part.shape[1]] = part

    def drop(self, row: int, last: int, first: int, end: int) -> None:
        for buffer in self._pair or ():
            if row != last:
                buffer[row, :, first:end] = buffer[last, :, first:end]
            buffer[last, :, first:end] = 0

    def move(self, rows: int, first: int, end: int, to: int) -> None:
        old = self._pair
        if old is None:
            return
        self.lazy_initialization(old[0][0], old[1][0])
        for buffer, before in zip(self._pair or (), old, strict=True):
            buffer[:rows, :, to : to + end - first] = before[:rows, :, first:end]
