"""Keys and values of finished requests, for those that begin alike: a chat's next turn, a common instruction."""

from collections import OrderedDict

import numpy as np

from .kv_timeline import KeysAndValues

_SHORTEST = 8


class Prefixes:
    """Keeps what was read under the same weights, least recently used out first.

    Args:
        limit_bytes: of all together; 0 keeps nothing.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._kept: OrderedDict[tuple[str, bytes], tuple[np.ndarray, KeysAndValues, int]] = OrderedDict()
        self.nbytes = 0

    def find(self, weights: str, prompt: list[int]) -> KeysAndValues | None:
        """What is kept of the longest common beginning, of all but the prompt's last token, which has to be run."""
        wanted = np.asarray(prompt[:-1])
        best: tuple[int, tuple[str, bytes]] | None = None
        for key, (tokens, _, _) in self._kept.items():
            if key[0] != weights:
                continue
            shared = _common(tokens, wanted)
            if shared >= _SHORTEST and (best is None or shared > best[0]):
                best = shared, key
        if best is None:
            return None
        self._kept.move_to_end(best[1])
        return [(keys[:, : best[0]], values[:, : best[0]]) for keys, values in self._kept[best[1]][1]]

    def keep(self, weights: str, tokens: list[int], pairs: KeysAndValues) -> None:
        """Keep copies of what was read of a row; `pairs` hold the first of its `tokens`."""
        count = pairs[0][0].shape[1]
        size = sum(part.numel() * part.element_size() for pair in pairs for part in pair)
        if count < _SHORTEST or size > self._limit:
            return
        known = np.asarray(tokens[:count])
        shared = {k: (_common(t, known), len(t)) for k, (t, _, _) in self._kept.items() if k[0] == weights}
        if any(same == count for same, _ in shared.values()):
            return  # a longer one says all that this one does
        for other in [k for k, (same, length) in shared.items() if same == length]:
            self._drop(other)
        self._kept[weights, known.tobytes()] = known, [(keys.clone(), values.clone()) for keys, values in pairs], size
        self.nbytes += size
        while self.nbytes > self._limit:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: tuple[str, bytes]) -> None:
        self.nbytes -= self._kept.pop(key)[2]


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many elements two arrays have in common from the start."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size
