"""Rows that run together: their tokens, their caches, their adapters."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapters.prompt import text_config
from .factors import FactorLayout
from .kv_timeline import KeysAndValues, KvTimeline
from .mixtures import Mixtures
from .request import Chunk, Request
from .sampling import RowSampler
from .slots import RowAdapters, Slots
from .text import TextStream


@dataclass(eq=False)
class Row:
    """A request on its way.

    Attributes:
        tokens: the prompt and what was made so far.
        cached_tokens: of the prompt, those whose keys and values were there already.
        unsent: what a request that does not stream gets at the end.
        began, decoding: when its prefill and its decoding began, in seconds of `time.monotonic`.
    """

    request: Request
    sampler: RowSampler
    text: TextStream
    tokens: list[int]
    cached_tokens: int = 0
    unsent: list[Chunk] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    decoding: float = 0.0

    @property
    def made(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


class Runner:
    """The model, as batches use it."""

    def __init__(self, model: Any, layout: FactorLayout, mixtures: Mixtures | None) -> None:
        self.model, self.layout, self._mixtures = model, layout, mixtures
        self.layers = int(text_config(model).num_hidden_layers)
        self._slots = Slots(model, layout)

    def close(self) -> None:
        """Leave the model as it was."""
        self._slots.remove()

    def new_adapters(self, *, few_tokens: bool) -> RowAdapters:
        """For batches of one token a row, or of many. A CPU multiplies a few rows in half precision more slowly than
        in float32."""
        device, dtype = self.model.device, self.model.dtype
        return RowAdapters(self.layout, torch.float32 if few_tokens and device.type == "cpu" else dtype, device)

    def forward(self, tokens: list[list[int]], timeline: KvTimeline, batch: "Batch") -> Tensor:
        """Logits `(rows, vocabulary)` at the last of the tokens `(rows, columns)`."""
        new = len(tokens[0])
        inputs = {key: _on(value, self.model.device) for key, value in timeline.inputs(new).items()}
        ids = torch.tensor(tokens, device=self.model.device)
        with self._slots.serving(batch.adapters), self.routing(batch):
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **inputs)
        timeline.advance(new)
        return output.logits[:, -1]

    @contextmanager
    def routing(self, batch: "Batch | None") -> Iterator[None]:
        """Let mixtures act on the rows that name them; without a batch, on none."""
        if self._mixtures is None:
            yield
            return
        with self._mixtures.serving([row.request.route for row in batch.rows] if batch else []):
            yield


class Batch:
    """Rows with one timeline."""

    decodes = True

    def __init__(self, runner: Runner, timeline: KvTimeline | None = None) -> None:
        self._runner = runner
        self.rows: list[Row] = []
        self.timeline = timeline or KvTimeline(runner.layers)
        self.adapters = runner.new_adapters(few_tokens=self.decodes)

    def __len__(self) -> int:
        return len(self.rows)

    def cache_tokens(self, *joining: Request) -> int:
        """How many tokens' keys and values the rows and those joining can come to need, padding included."""
        requests = [*(row.request for row in self.rows), *joining]
        return len(requests) * max((request.longest for request in requests), default=0)

    def decode(self) -> Tensor:
        """Run the last token of every row; logits `(rows, vocabulary)`."""
        return self._runner.forward([[row.tokens[-1]] for row in self.rows], self.timeline, self)

    def join(self, other: "Batch", row: int) -> None:
        self.timeline.join(other.timeline, row)
        self._take(other.rows[row])

    def remove(self, row: int) -> None:
        self.timeline.remove(row)
        self.adapters.remove(row)
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last

    def _take(self, row: Row) -> None:
        self.rows.append(row)
        self.adapters.add(row.request.route)


class Prefill(Batch):
    """Prompts that are read chunk by chunk, all ending at the same column.

    Args:
        rows: who reads.
        kept: what is known of each row's prompt already.
        chunk: columns to read at a time.
    """

    decodes = False

    def __init__(self, runner: Runner, rows: list[Row], kept: list[KeysAndValues | None], chunk: int) -> None:
        end = max(len(row.tokens) for row in rows)
        known = [0 if pairs is None else pairs[0][0].shape[1] for pairs in kept]
        unread = max(len(row.tokens) - count for row, count in zip(rows, known, strict=True))
        starts = [end - len(row.tokens) for row in rows]
        super().__init__(runner, KvTimeline(runner.layers, starts, end - unread, columns=end))
        self._chunk, self._end = chunk, end
        for number, (row, pairs) in enumerate(zip(rows, kept, strict=True)):
            row.cached_tokens = max(0, len(row.tokens) - unread)
            if pairs is not None and row.cached_tokens:
                pairs = [(keys[:, : row.cached_tokens], values[:, : row.cached_tokens]) for keys, values in pairs]
                self.timeline.fill(number, pairs)
            self._take(row)

    def step(self) -> Tensor | None:
        """Read the next columns; after the last, logits `(rows, vocabulary)`."""
        timeline = self.timeline
        new = min(self._chunk, self._end - timeline.end)
        columns = range(timeline.end, timeline.end + new)
        tokens = [
            [row.tokens[column - start] if column >= start else 0 for column in columns]
            for row, start in zip(self.rows, timeline.starts, strict=True)
        ]
        logits = self._runner.forward(tokens, timeline, self)
        return logits if timeline.end == self._end else None


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
