"""Answers that obey a JSON schema, by llguidance."""

from typing import Any

import llguidance
import llguidance.hf
import torch
from llguidance.torch import apply_token_bitmask_inplace, fill_next_token_bitmask
from torch import Tensor

from ..support.errors import ConfigError

# A small model that may write spaces anywhere can go on writing them to the end.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarCompiler:
    """Makes grammars for one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._prepared: Any = None

    def compile(self, schema: str) -> "Grammar":
        """Prepare to follow a JSON schema (as JSON text).

        Raises:
            ConfigError: the schema cannot be followed, or the tokenizer's tokens cannot be told.
        """
        if self._prepared is None:
            try:
                self._prepared = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocabulary)
            except ValueError as error:
                raise ConfigError(f"this base's tokenizer cannot follow JSON schemas: {error}") from None
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT)
        except ValueError as error:
            raise ConfigError(f"the JSON schema cannot be followed: {error}") from None
        matcher = llguidance.LLMatcher(self._prepared, text)
        if matcher.is_error():
            raise ConfigError(f"the JSON schema cannot be followed: {matcher.get_error()}")
        return Grammar(matcher, self._vocabulary)


class Grammar:
    """One answer on its way through a schema."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._mask = torch.full((1, (vocabulary + 31) // 32), -1, dtype=torch.int32)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more may follow."""
        return bool(self._matcher.is_stopped())

    def restrict(self, logits: Tensor) -> None:
        """Leave only tokens that may come next, in place."""
        fill_next_token_bitmask(self._matcher, self._mask)
        apply_token_bitmask_inplace(logits.unsqueeze(0), self._mask.to(logits.device))

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
