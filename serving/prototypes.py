"""Choosing without training: the adapter whose example prompts are, on average, nearest to this prompt.

Adapters may come and go. After RouterRetriever (Lee et al. 2024, arXiv:2409.02685)."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .choice import TEMPERATURE, Embed

_log = logging.getLogger("loramux.serving")
_AT_ONCE = 8
_WAIT_S = 600.0

Examples = Mapping[str, tuple[str, ...]]


class Prototypes:
    """The mean direction of every adapter's example prompts, kept up by a thread of its own.

    Args:
        examples: gives the example prompts of the adapters that there are now, by name.
        encode: a prompt as token ids, as requests are encoded.
        embed: of the engine; prompts are read a few at a time, between the steps of others.
        temperature: of the cosines.
    """

    def __init__(
        self,
        examples: Callable[[], Examples],
        encode: Callable[[str], list[int]],
        embed: Embed,
        *,
        temperature: float = TEMPERATURE,
    ) -> None:
        self._examples, self._encode, self._embed, self._temperature = examples, encode, embed, temperature
        self._known: dict[str, tuple[tuple[str, ...], Tensor]] = {}
        self._table: tuple[tuple[str, ...], Tensor] = ((), torch.zeros(0, 1))
        self._changed = threading.Condition()
        self._stale, self._busy, self._stopping = True, False, False
        self._thread = threading.Thread(target=self._work, name="prototypes", daemon=True)

    def start(self) -> "Prototypes":
        self._thread.start()
        return self

    def refresh(self) -> None:
        """Adapters have come or gone; returns at once."""
        with self._changed:
            self._stale = True
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all adapters that were there when this was called are known; whether that came to pass."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._stale or self._busy), timeout_s)

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def scores(self, pooled: Tensor) -> tuple[Sequence[str], Tensor]:
        """Names and cosines over the temperature `(names,)` for one pooled prompt `(width,)`."""
        names, directions = self._table
        if not names:
            return names, torch.zeros(0)
        return names, directions @ F.normalize(pooled.float(), dim=-1) / self._temperature

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._stale or self._stopping)
                if self._stopping:
                    return
                self._stale, self._busy = False, True
            self._follow(self._examples())

    def _follow(self, examples: Examples) -> None:
        """Forget who is gone at once, then get to know who is new one by one."""
        self._known = {name: kept for name, kept in self._known.items() if examples.get(name) == kept[0]}
        self._publish()
        for name, prompts in examples.items():
            if prompts and name not in self._known and (direction := self._direction(name, prompts)) is not None:
                self._known[name] = prompts, direction
                self._publish()

    def _direction(self, name: str, prompts: Sequence[str]) -> Tensor | None:
        """The mean direction `(width,)`; None where the engine cannot read the prompts, which is told."""
        try:
            ids = [self._encode(prompt) for prompt in prompts]
            parts = [ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE)]
            pooled = torch.cat([self._embed(part).result(_WAIT_S) for part in parts])
        except Exception as error:
            _log.warning("adapter %s is not chosen automatically: its example prompts cannot be read: %s", name, error)
            return None
        return F.normalize(F.normalize(pooled.float(), dim=-1).sum(0), dim=-1)

    def _publish(self) -> None:
        if self._known:
            self._table = tuple(self._known), torch.stack([direction for _, direction in self._known.values()])
        else:
            self._table = (), torch.zeros(0, 1)
