"""How a model answers a batch of prompts: options compared by log-likelihood, or text generated greedily.

A prompt is run once for all its options: what follows is read from copies of its key-value cache, and options that
differ in the last token only are one row. Copies of a prompt lie next to each other, as beams do, so every routing
decision made per prompt stays with its rows.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ..adapters.hub import LoramuxModel
from .answer_logits import base_of

Tokens = Sequence[int]
_LOGIT_BUDGET = 2**26  # floats of one block of log-probabilities: 256 MB
_MOST_COPIES = 16


class Respondent:
    """A model under questioning.

    Args:
        model: a causal LM, bare or with adapters, in eval mode.
        tokenizer: gives the padding and the end token.
        routing: keyword arguments for every forward, such as `{"routing_tasks": "who"}`.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, routing: Mapping[str, Any] | None = None
    ) -> None:
        self.model, self.tokenizer, self.routing = model, tokenizer, dict(routing or {})
        tuner = getattr(model, "base_model", None)
        self._hub = tuner if isinstance(tuner, LoramuxModel) else None
        self._accepted = set(inspect.signature(base_of(model).forward).parameters)
        self._positions = positions_of(model)
        self.device = next(model.parameters()).device
        self.pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    @torch.no_grad()
    def option_scores(self, prompts: Sequence[Tokens], options: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        """The log-likelihood (in nats, summed over tokens) of every option of every prompt."""
        ids, mask = left_padded(prompts, self.pad_id, self.device)
        flat = [(prompt, tuple(option)) for prompt, listed in enumerate(options) for option in listed]
        beginnings = [sorted({tuple(o[:-1]) for o in listed if len(o) > 1}, key=len) for listed in options]
        logits, cache = self._forward(ids, mask, keep=1, use_cache=any(beginnings))
        first = logits[:, -1].float().log_softmax(-1)
        scores = first[[prompt for prompt, _ in flat], [option[0] for _, option in flat]].double().cpu()
        for block in _blocks(beginnings, _LOGIT_BUDGET // first.shape[-1]):
            log_probs = self._continue(block, prompts, mask, cache)
            numbers, *places = _picks(block, flat)
            scores.index_add_(0, torch.tensor(numbers), log_probs[tuple(places)].double().cpu())
        return [part.tolist() for part in scores.split([len(listed) for listed in options])]

    @torch.no_grad()
    def generate(self, prompts: Sequence[Tokens], max_new_tokens: int, stop_ids: Sequence[int] = ()) -> list[list[int]]:
        """Greedy answers, each up to the first of `stop_ids` (default: the end of sequence) and no longer than told.

        An answer is also no longer than the model has positions for after its own prompt, whatever stands beside it.
        """
        stops = list(stop_ids) or [i for i in [self.tokenizer.eos_token_id] if i is not None]
        rooms = [self._room(prompt, max_new_tokens) for prompt in prompts]
        answers: dict[int, list[int]] = {}
        # Only rows of the same room run together: one that went on for a neighbour would leave the model's positions.
        for room in sorted(set(rooms)):
            rows = [row for row, own in enumerate(rooms) if own == room]
            answers |= zip(rows, self._generate([prompts[row] for row in rows], room, stops), strict=True)
        return [answers[row] for row in range(len(prompts))]

    def routes(self) -> list[str] | None:
        """The task whose expert got each prompt of the last call; None unless a router picks experts by task."""
        if self._hub is None or not self._hub.routes_by_prompt:
            return None
        names, decisions = self._hub.tasks, list(self._hub.context.decisions.values())
        if len(decisions) != 1 or decisions[0].weights.shape[-1] != len(names):
            return None
        return [names[gate] for gate in decisions[0].weights.argmax(-1).tolist()]

    def _room(self, prompt: Tokens, max_new_tokens: int) -> int:
        return max_new_tokens if self._positions is None else max(1, min(max_new_tokens, self._positions - len(prompt)))

    def _generate(self, prompts: Sequence[Tokens], room: int, stops: list[int]) -> list[list[int]]:
        ids, mask = left_padded(prompts, self.pad_id, self.device)
        settings = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad_id,
            eos_token_id=stops or None,
        )
        produced = self.model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=settings, **self.routing
        )
        return [_until(row, stops) for row in produced[:, ids.shape[1] :].tolist()]

    def _forward(
        self,
        ids: Tensor,
        mask: Tensor,
        keep: int,
        use_cache: bool = False,
        cache: Cache | None = None,
        prompt: Tensor | None = None,
    ) -> tuple[Tensor, Cache | None]:
        """Logits of the last `keep` positions, and the cache when asked for.

        Args:
            prompt: `(batch, tokens)`, where a router may look when that is not everything.
        """
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extras = {
            "position_ids": positions,
            "logits_to_keep": keep,
            "use_cache": use_cache,
            "past_key_values": cache,
        }
        extras = {name: value for name, value in extras.items() if name in self._accepted and value is not None}
        if self._hub is not None and prompt is not None:
            extras["routing_mask"] = prompt
        out = self.model(input_ids=ids, attention_mask=mask, **extras, **self.routing)
        return out.logits[:, -keep:], getattr(out, "past_key_values", None) if use_cache else None

    def _continue(self, block: "_Block", prompts: Sequence[Tokens], mask: Tensor, cache: Cache | None) -> Tensor:
        """Log-probabilities `(rows, width, vocabulary)` of what follows each token of each beginning."""
        if _can_be_copied(cache):
            past = copy.deepcopy(cache)
            past.batch_repeat_interleave(block.copies)  # type: ignore[union-attr]
            ids, seen = right_padded(block.rows, self.pad_id, self.device)
            seen = torch.cat([mask.repeat_interleave(block.copies, 0), seen], 1)
            logits, _ = self._forward(ids, seen, keep=ids.shape[1], use_cache=True, cache=past)
            return logits.float().log_softmax(-1)
        whole = [[*prompts[row // block.copies], *tokens] for row, tokens in enumerate(block.rows)]
        ids, seen = left_padded(whole, self.pad_id, self.device)
        lengths = torch.tensor([len(tokens) for tokens in block.rows], device=self.device)
        prompt = seen.bool() & (torch.arange(ids.shape[1], device=self.device) < ids.shape[1] - lengths[:, None])
        logits, _ = self._forward(ids, seen, keep=block.width, prompt=prompt)
        shifted = [row.roll(len(tokens), 0) for row, tokens in zip(logits, block.rows, strict=True)]
        return torch.stack(shifted).float().log_softmax(-1)


@dataclass(frozen=True)
class _Block:
    """Option beginnings to run together: `copies` of them per prompt, prompt after prompt; `()` fills up."""

    rows: list[tuple[int, ...]]
    copies: int

    @property
    def width(self) -> int:
        return max(map(len, self.rows))


def positions_of(model: nn.Module) -> int | None:
    """How many tokens the model takes, where its config tells."""
    return getattr(base_of(model).config, "max_position_embeddings", None)


def _blocks(beginnings: list[list[tuple[int, ...]]], most_tokens: int) -> Iterator[_Block]:
    """Cut the beginnings of all prompts, shortest first, into blocks of at most `most_tokens` padded tokens."""
    most = max(map(len, beginnings))
    filled: list[list[tuple[int, ...]]] = [[*own, *[()] * (most - len(own))] for own in beginnings]
    start = 0
    while start < most:
        block = _block(filled, start, min(_MOST_COPIES, most - start))
        while block.copies > 1 and len(block.rows) * block.width > most_tokens:
            block = _block(filled, start, block.copies // 2)
        yield block
        start += block.copies


def _block(filled: list[list[tuple[int, ...]]], start: int, copies: int) -> _Block:
    return _Block([row for own in filled for row in own[start : start + copies]], copies)


def _picks(block: _Block, flat: list[tuple[int, tuple[int, ...]]]) -> list[list[int]]:
    """Which log-probabilities belong to which option: option numbers, rows, places and tokens, side by side."""
    row_of = {(row // block.copies, tokens): row for row, tokens in enumerate(block.rows)}
    found = [(number, row_of.get((prompt, option[:-1])), option) for number, (prompt, option) in enumerate(flat)]
    picks = [
        (number, row, place, option[place + 1])
        for number, row, option in found
        if row is not None and len(option) > 1
        for place in range(len(option) - 1)
    ]
    return [list(column) for column in zip(*picks, strict=True)]


def _until(tokens: list[int], stops: Sequence[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


def _can_be_copied(cache: Cache | None) -> bool:
    """Whether the whole state is keys and values; recurrent states cannot be repeated row by row."""
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and all(isinstance(layer, DynamicLayer) for layer in layers)


def left_padded(rows: Sequence[Tokens], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask `(batch, tokens)`, so that every row ends in the last column."""
    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def right_padded(rows: Sequence[Tokens], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same, so that every row begins in the first column."""
    ids, mask = left_padded([row[::-1] for row in rows], pad_id, device)
    return ids.flip(1), mask.flip(1)
