"""Answers that obey a JSON schema, by llguidance."""

from collections import OrderedDict
from typing import Any

import llguidance
import llguidance.hf
import torch
from llguidance.torch import fill_next_token_bitmask
from torch import Tensor

from ..support.errors import ConfigError

# A small model that may write spaces anywhere can go on writing them to the end.
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LIMITS = llguidance.LLParserLimits(verbose_errors=False)
_LARGEST_SCHEMA, _KEPT = 1 << 17, 16


class GrammarCompiler:
    """Makes grammars for one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._prepared: Any = None
        self._matchers: OrderedDict[str, Any] = OrderedDict()

    def compile(self, schema: str) -> "Grammar":
        """Prepare to follow a JSON schema (as JSON text).

        Raises:
            ConfigError: the schema cannot be followed, or the tokenizer's tokens cannot be told.
        """
        if schema not in self._matchers:
            self._matchers[schema] = self._matcher(schema)
            if len(self._matchers) > _KEPT:
                self._matchers.popitem(last=False)
        self._matchers.move_to_end(schema)
        return Grammar(self._matchers[schema].deep_copy(), self._vocabulary)

    def _matcher(self, schema: str) -> Any:
        if len(schema) > _LARGEST_SCHEMA:
            raise ConfigError(f"the JSON schema has {len(schema)} characters; at most {_LARGEST_SCHEMA} are followed")
        if self._prepared is None:
            try:
                self._prepared = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocabulary)
            except ValueError as error:
                raise ConfigError(f"this base's tokenizer cannot follow JSON schemas: {error}") from None
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT)
        except ValueError as error:
            raise ConfigError(f"the JSON schema cannot be followed: {error}") from None
        matcher = llguidance.LLMatcher(self._prepared, text, limits=_LIMITS)
        if matcher.is_error():
            raise ConfigError(f"the JSON schema cannot be followed: {matcher.get_error()}")
        return matcher


class Grammar:
    """One answer on its way through a schema."""

    _bits = torch.arange(32, dtype=torch.int32)

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._mask = torch.full((1, (vocabulary + 31) // 32), -1, dtype=torch.int32)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def problem(self) -> str | None:
        """Why the schema cannot be followed any further, as where it takes too much work."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else None

    def restrict(self, logits: Tensor) -> None:
        """Leave only tokens that may come next, in place."""
        fill_next_token_bitmask(self._matcher, self._mask)
        allowed = (self._mask[0].to(logits.device).unsqueeze(1) >> self._bits.to(logits.device)) & 1
        logits.masked_fill_(allowed.flatten()[: len(logits)] == 0, -torch.inf)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
