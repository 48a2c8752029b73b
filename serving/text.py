"""From tokens to text, as they come: no half characters, nothing of a stop string."""

from collections.abc import Sequence
from typing import Any


class Speller:
    """How single tokens are written within a text; some tokenizers write them differently where a text begins."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._known = self._decode(self._before)

    def spell(self, token: int) -> str:
        """The text that a token adds; with U+FFFD where it holds a part of a character."""
        text = self._decode([*self._before, token])
        return text[len(self._known) :] if text.startswith(self._known) else self._decode([token])

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: of the base.
        stops: the text ends before the first of these.
        streams: whether text is wanted as it comes; else it is made when a stop string has to be looked for, or last.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], *, streams: bool) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._waits = not streams and not stops
        self._tokens: list[int] = []
        self._begin = 0
        self._read = 0
        self._pending = ""
        self._given = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take a token; give the text that is certain by now."""
        self._tokens.append(token)
        if self._waits:
            return ""
        self._pending += self._new_text()
        return self._release(last=False)

    def finish(self) -> str:
        """Give what is left."""
        if not self.is_stopped:
            whole = self._decode(self._tokens)
            seen = self._given + self._pending
            self._pending += whole[len(seen) :] if whole.startswith(seen) else ""
        return self._release(last=True)

    def _new_text(self) -> str:
        """Tokens are read together with the few before them, since some tokenizers write a token differently where a
        text begins."""
        before = self._decode(self._tokens[self._begin : self._read])
        text = self._decode(self._tokens[self._begin :])
        if len(text) <= len(before) or text.endswith("\ufffd"):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return text[len(before) :]

    def _release(self, *, last: bool) -> str:
        if self.is_stopped:
            return ""
        text = self._pending
        cuts = [text.find(stop) for stop in self._stops if stop in text]
        if cuts:
            self.is_stopped = True
            text = text[: min(cuts)]
        elif not last:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)]
        self._pending = self._pending[len(text) :]
        self._given += text
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """How much of the end of `text` may be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
