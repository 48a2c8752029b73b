"""Continuous batching: requests join and leave at step boundaries, whatever adapter, mixture or bare base they want.

One thread runs the model. Each step reads a chunk of waiting prompts, if there are any, and makes one token for every
running row, so that nobody's long prompt or new adapter makes others wait for more than a step.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..adapters.prompt import pool_prompt, text_config
from .batch import Batch, Prefill, Row, Runner
from .errors import ServingError, is_out_of_memory
from .factors import FactorLayout
from .fair_queue import FairQueue
from .grammar import GrammarCompiler
from .kv_timeline import check_cache
from .mixtures import Mixtures
from .prefixes import Prefixes
from .request import Chunk, Event, Failed, Finished, FinishReason, Request, TokenChoice
from .sampling import Choices, RowSampler, choose
from .text import Speller, TextStream
from .threads import compute_on

_log = logging.getLogger(__name__)
_UNLIMITED = 1 << 20
_COMPANY_S = 0.002  # after idling: requests that come together are read together
_SHUTTING_DOWN = "the server is shutting down"


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of the engine.

    Attributes:
        max_rows: requests that are decoded together.
        max_cache_tokens: tokens of keys and values that all running rows together may come to need, padding included.
        prefill_tokens: prompt tokens, padding included, that are read together.
        prefill_chunk: columns of prompts that are read between two decoding steps.
        prefix_bytes: memory for keys and values of finished requests.
        max_waiting: requests that may wait.
        threads: that compute; 0 for as many as torch has where the engine is made. See `threads`.
    """

    max_rows: int = 32
    max_cache_tokens: int = 65_536
    prefill_tokens: int = 4_096
    prefill_chunk: int = 256
    prefix_bytes: int = 256 << 20
    max_waiting: int = 1024
    threads: int = 0


@dataclass(frozen=True)
class EngineStats:
    """A look at the engine.

    Attributes:
        running, prefilling, waiting: requests.
        waiting_by_name: by the name of their route.
        cache_tokens: tokens that running rows may come to need.
        prefix_bytes: kept of finished requests.
        steps: decoding steps so far.
        tokens: tokens made so far.
    """

    running: int
    prefilling: int
    waiting: int
    waiting_by_name: dict[str, int]
    cache_tokens: int
    prefix_bytes: int
    steps: int
    tokens: int


@dataclass
class _Embedding:
    """Prompts to embed, and the vectors `(prompts, width)` that were made so far."""

    prompts: list[list[int]]
    future: Future[Tensor]
    made: list[Tensor] = field(default_factory=list)

    def next_prompts(self, most_tokens: int) -> list[list[int]]:
        """Those that are next, of at most so many tokens, padding included, but at least one."""
        rest = self.prompts[sum(map(len, self.made)) :]
        sizes = enumerate(accumulate(map(len, rest), max), 1)
        return rest[: max(1, sum(count * longest <= most_tokens for count, longest in sizes))]


class Engine:
    """Serves requests on one frozen model.

    Args:
        model: a causal language model of transformers, in evaluation mode; the one inside a hub, where mixtures are
            served.
        tokenizer: of the model.
        layout: of the adapters that come with requests.

    Raises:
        ConfigError: the model's cache cannot be batched.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layout: FactorLayout,
        options: EngineOptions | None = None,
        mixtures: Mixtures | None = None,
    ) -> None:
        check_cache(model)
        self.options = options or EngineOptions()
        self.tokenizer = tokenizer
        self._model = model
        self._runner = Runner(model, layout, mixtures)
        self._grammars = GrammarCompiler(tokenizer, int(text_config(model).vocab_size))
        self._speller = Speller(tokenizer)
        self._ends = _end_tokens(model, tokenizer)
        self._prefixes = Prefixes(self.options.prefix_bytes)
        self._running = Batch(self._runner)
        self._reading: Prefill | None = None
        self._waiting: FairQueue[Request] = FairQueue()
        self._arrived: deque[Request] = deque()
        self._to_embed: deque[_Embedding] = deque()
        self._wake = threading.Condition()
        self._stopping = self._drop_all = False
        self._threads = self.options.threads or torch.get_num_threads()
        self._steps = self._tokens = 0
        self._thread = threading.Thread(target=self._loop, name="loramux-engine", daemon=True)

    # ------------------------------------------------------------------ from other threads

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        config = text_config(self._model)
        own = getattr(config, "max_position_embeddings", None) or _UNLIMITED
        return min(own, self.options.max_cache_tokens)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Take a request; its events come on the engine's thread.

        Raises:
            ServingError: it is too long, the queue is full, or the engine is stopping.
        """
        if not request.prompt:
            raise ServingError("empty_prompt", "the prompt has no tokens", 400)
        if request.longest > self.max_length:
            raise ServingError(
                "context_length_exceeded",
                f"the prompt has {len(request.prompt)} tokens and the answer may have "
                f"{request.sampling.max_tokens}; together they may have at most {self.max_length}",
                400,
            )
        with self._wake:
            if self._stopping:
                raise ServingError("shutting_down", _SHUTTING_DOWN, 503)
            if len(self._waiting) + len(self._arrived) >= self.options.max_waiting:
                raise ServingError("queue_full", f"{self.options.max_waiting} requests are waiting already", 429)
            self._arrived.append(request)
            self._wake.notify()

    def embed(self, prompts: list[list[int]]) -> "Future[Tensor]":
        """The mean last hidden state of the bare base over each prompt, as far as the base can read it, `(prompts,
        width)`."""
        prompts = [prompt[: self.max_length] for prompt in prompts]
        future: Future[Tensor] = Future()
        with self._wake:
            if self._stopping:
                future.set_exception(ServingError("shutting_down", _SHUTTING_DOWN, 503))
            else:
                self._to_embed.append(_Embedding(prompts, future))
                self._wake.notify()
        return future

    def stop(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Take no more requests, finish those there are (or drop them), and end the thread."""
        with self._wake:
            self._stopping = True
            self._drop_all = not drain
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def stats(self) -> EngineStats:
        reading = self._reading
        return EngineStats(
            running=len(self._running),
            prefilling=0 if reading is None else len(reading),
            waiting=len(self._waiting) + len(self._arrived),
            waiting_by_name=dict(self._waiting.waiting),
            cache_tokens=self._running.cache_tokens(),
            prefix_bytes=self._prefixes.nbytes,
            steps=self._steps,
            tokens=self._tokens,
        )

    # ------------------------------------------------------------------ the engine's thread

    @torch.inference_mode()
    def _loop(self) -> None:
        compute_on(self._threads)
        while self._wait_for_work():
            self._take_arrivals()
            self._drop_unwanted()
            self._embed_some()
            self._read_prompts()
            self._decode()
        self._runner.close()

    def _wait_for_work(self) -> bool:
        """False when there is none and there will be none."""
        with self._wake:
            while not (self._arrived or self._to_embed or self._waiting or self._reading or self._running.rows):
                if self._stopping:
                    return False
                self._wake.wait()
                self._wake.wait_for(lambda: self._stopping, _COMPANY_S)
        return True

    def _take_arrivals(self) -> None:
        while self._arrived:
            request = self._arrived.popleft()
            self._waiting.push(request.route.name, request.longest, request)

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        waiting = {request: reason for request in self._waiting if (reason := self._unwanted(request, now))}
        if waiting:
            self._waiting.remove(set(waiting))
        for request, reason in waiting.items():
            self._tell(request, Finished(reason, len(request.prompt), 0, queued_s=now - request.arrived))
        for batch in filter(None, (self._reading, self._running)):
            for number in reversed(range(len(batch))):
                reason = self._unwanted(batch.rows[number].request, now)
                if reason:
                    self._finish(batch.rows[number], reason)
                    batch.remove(number)
        if self._reading is not None and not self._reading.rows:
            self._reading = None

    def _unwanted(self, request: Request, now: float) -> FinishReason | None:
        if request.is_cancelled or self._drop_all:
            return "cancelled"
        return "deadline" if request.deadline is not None and now > request.deadline else None

    def _embed_some(self) -> None:
        """As many prompts of the first embedding as are read together."""
        if not self._to_embed:
            return
        embedding = self._to_embed[0]
        try:
            if not embedding.future.cancelled():
                embedding.made.append(self._pooled(embedding.next_prompts(self.options.prefill_tokens)))
                if embedding.next_prompts(self.options.prefill_tokens):
                    return
                embedding.future.set_result(torch.cat(embedding.made))
        except InvalidStateError:
            pass  # it was cancelled meanwhile
        except Exception as error:
            _log.exception("embedding %d prompts failed", len(embedding.prompts))
            with suppress(InvalidStateError):
                embedding.future.set_exception(_engine_error(error))
        self._to_embed.popleft()

    def _pooled(self, prompts: list[list[int]]) -> Tensor:
        longest = max(len(prompt) for prompt in prompts)
        mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
        ids, mask = ids.to(self._model.device), mask.to(self._model.device)
        with self._runner.routing(None):
            return pool_prompt(self._model, ids, {"attention_mask": mask}, None).cpu()

    def _read_prompts(self) -> None:
        rows = self._next_rows() if self._reading is None else self._reading.rows
        if not rows:
            return
        try:
            if self._reading is None:
                self._reading = self._new_reading(rows)
            logits = self._reading.step()
            if logits is None:
                return
            choices = choose(logits, [row.sampler for row in rows])
        except Exception as error:
            self._reading = None
            self._fail(rows, error)
            return
        reading, self._reading = self._reading, None
        now = time.monotonic()
        for number, row in enumerate(rows):
            row.decoding = now
            if not self._advance(row, number, choices):
                self._join(reading, number)
            elif number not in choices.broken:
                self._keep(reading, number)

    def _new_reading(self, rows: list[Row]) -> Prefill:
        kept = [self._prefixes.find(row.request.route.weights, row.tokens) for row in rows]
        return Prefill(self._runner, rows, kept, self.options.prefill_chunk)

    def _join(self, reading: Prefill, number: int) -> None:
        try:
            self._running.join(reading, number)
        except Exception as error:
            self._fail_running(error, reading.rows[number])

    def _keep(self, batch: Batch, number: int) -> None:
        """Keep what was read of a row that ends, where there is memory for it."""
        row = batch.rows[number]
        try:
            self._prefixes.keep(row.request.route.weights, row.tokens, batch.timeline.read(number))
        except Exception:
            _log.exception("a prefix of %d tokens is not kept", len(row.tokens))

    def _next_rows(self) -> list[Row]:
        """Requests that may join now, in the queue's order, as many as can be read together."""
        joining: list[Request] = []
        while self._waiting and len(self._running) + len(joining) < self.options.max_rows:
            request = self._waiting.peek()
            longest = max(len(other.prompt) for other in (*joining, request))
            if joining and longest * (len(joining) + 1) > self.options.prefill_tokens:
                break
            if self._running.cache_tokens(*joining, request) > self.options.max_cache_tokens:
                break
            joining.append(self._waiting.pop())
        return [row for request in joining if (row := self._row(request)) is not None]

    def _row(self, request: Request) -> Row | None:
        sampling = request.sampling
        try:
            grammar = self._grammars.compile(sampling.schema) if sampling.schema is not None else None
        except Exception as error:
            self._tell(request, Failed("invalid_schema", str(error), 400))
            return None
        text = TextStream(self.tokenizer, sampling.stop, streams=request.streams)
        return Row(request, RowSampler(sampling, grammar, self._model.device), text, list(request.prompt))

    def _decode(self) -> None:
        running = self._running
        if not running.rows:
            return
        try:
            choices = choose(running.decode(), [row.sampler for row in running.rows])
        except Exception as error:
            self._fail_running(error)
            return
        self._steps += 1
        for number in reversed(range(len(running))):
            if self._advance(running.rows[number], number, choices):
                if number not in choices.broken:
                    self._keep(running, number)
                running.remove(number)

    def _advance(self, row: Row, number: int, choices: Choices) -> bool:
        """Give a row its next token; whether that was its last."""
        if number in choices.broken:
            self._tell(
                row.request, Failed("not_finite", f"adapter {row.request.route.name!r} made values that are not finite")
            )
            return True
        self._tokens += 1
        token, sampling = choices.tokens[number], row.request.sampling
        row.tokens.append(token)
        row.sampler.note(token)
        text = row.text.add(token)
        reported = self._reported(token, choices.logprobs.get(number))
        if row.request.streams and (text or reported):
            self._tell(row.request, Chunk(text, reported))
        elif text or reported:
            row.unsent.append(Chunk(text, reported))
        grammar = row.sampler.grammar
        if grammar is not None and grammar.problem is not None:
            problem = f"the JSON schema cannot be followed: {grammar.problem}"
            self._tell(row.request, Failed("invalid_schema", problem, 400))
            return True
        ended = (token in self._ends and not sampling.ignore_eos) or (grammar is not None and grammar.is_complete)
        if ended or row.text.is_stopped:
            self._finish(row, "stop")
        elif row.made >= sampling.max_tokens:
            self._finish(row, "length")
        else:
            return False
        return True

    def _reported(self, token: int, logprobs: tuple[float, list[tuple[int, float]]] | None) -> tuple[TokenChoice, ...]:
        if logprobs is None:
            return ()
        spell = self._speller.spell
        top = tuple((other, spell(other), logprob) for other, logprob in logprobs[1])
        return (TokenChoice(token, spell(token), logprobs[0], top),)

    def _finish(self, row: Row, reason: FinishReason) -> None:
        rest = row.text.finish()
        whole = [*row.unsent, Chunk(rest)]
        if rest or row.unsent:
            tokens = tuple(token for chunk in whole for token in chunk.tokens)
            self._tell(row.request, Chunk("".join(chunk.text for chunk in whole), tokens))
        now = time.monotonic()
        decoding = row.decoding or now
        self._tell(
            row.request,
            Finished(
                reason,
                prompt_tokens=len(row.request.prompt),
                completion_tokens=row.made,
                cached_tokens=row.cached_tokens,
                queued_s=row.began - row.request.arrived,
                prefill_s=decoding - row.began,
                decode_s=now - decoding,
            ),
        )

    def _tell(self, request: Request, event: Event) -> None:
        """Whoever cannot take events harms nobody else."""
        try:
            request.emit(event)
        except Exception:
            _log.exception("the events of a request are not taken")
            request.cancel()

    def _fail_running(self, error: Exception, *joining: Row) -> None:
        """Give up a batch that cannot be trusted any more."""
        given_up, self._running = self._running, Batch(self._runner)
        self._fail({*given_up.rows, *joining}, error)

    def _fail(self, rows: Iterable[Row], error: Exception) -> None:
        _log.exception("a step failed")
        failure = _engine_error(error)
        for row in rows:
            self._tell(row.request, Failed(failure.code, str(failure), failure.status))


def _engine_error(error: Exception) -> ServingError:
    if is_out_of_memory(error):
        return ServingError("out_of_memory", "the server ran out of memory for this request", 503)
    return ServingError("engine_error", "the model failed on this request; the server's log says why", 500)


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {end for end in [*listed, tokenizer.eos_token_id] if end is not None}
