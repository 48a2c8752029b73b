"""What the engine is asked, and what it answers."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .factors import PackedLora

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in the terms of OpenAI's API.

    Attributes:
        max_tokens: tokens to make at most.
        temperature: 0 takes the likeliest token every time.
        top_p: of the likeliest tokens, those that together reach this probability.
        top_k: of the likeliest tokens, this many; 0 for all.
        seed: makes sampling repeatable; None for anything.
        stop: the answer ends before the first of these strings.
        logprobs: how many of the likeliest tokens to report at each step beside the chosen one; None reports none.
        presence_penalty, frequency_penalty: off the logit of a token that was made already, once or for every time.
        logit_bias: what to add to the logits of single tokens.
        schema: a JSON schema (as JSON text) that the answer obeys.
        ignore_eos: go on to `max_tokens`.
    """

    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    schema: str | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Route:
    """What answers a request: the frozen base with adapters added, or a mixture that routes its tokens itself.

    Attributes:
        name: what users call it; requests of one name wait in one queue.
        weights: tells these very weights from all others, such as the content hashes of the adapters and their shares.
        parts: adapters and their shares; empty for the base alone.
        mixture: the name of a hosted mixture, if it is one.
        task: the task of a mixture that wants one.
    """

    name: str
    weights: str
    parts: tuple[tuple[PackedLora, float], ...] = ()
    mixture: str | None = None
    task: str | None = None

    @property
    def rank(self) -> int:
        return sum(lora.rank for lora, _ in self.parts)


BASE = Route(name="base", weights="base")


def mixed_weights(parts: Iterable[tuple[str, float]]) -> str:
    """`Route.weights` of a sum, of those of its parts and their shares."""
    return "+".join(f"{weights}*{share!r}" for weights, share in parts)


@dataclass(frozen=True)
class TokenChoice:
    """One token of an answer.

    Attributes:
        text: what it adds to the answer by itself.
        logprob: of the token, under the model's own distribution; None where none was asked for.
        top: the likeliest tokens as `(token, text, logprob)`.
    """

    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Chunk:
    """More of an answer. `text` can lag behind `tokens`: it waits while it may be the start of a stop string or half a
    character."""

    text: str
    tokens: tuple[TokenChoice, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        prompt_tokens, completion_tokens: how many there were.
        cached_tokens: of the prompt, those whose keys and values were kept from an earlier request.
        queued_s, prefill_s, decode_s: where the time went, in seconds.
    """

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Failed:
    """A request that the engine could not serve, with a stable code and the HTTP status it is answered with."""

    code: str
    message: str
    status: int = 500


Event = Chunk | Finished | Failed


@dataclass(eq=False)
class Request:
    """One answer to make.

    Attributes:
        prompt: token ids, at least one.
        emit: gets every event, on the engine's thread; it must not block. `Finished` or `Failed` comes last, and once.
        streams: whether text is wanted as it comes; else it comes in one piece at the end.
        deadline: in seconds of `time.monotonic`; None for never.
    """

    prompt: list[int]
    sampling: Sampling
    route: Route
    emit: Callable[[Event], None]
    streams: bool = True
    deadline: float | None = None
    arrived: float = field(default_factory=time.monotonic)
    is_cancelled: bool = False

    @property
    def longest(self) -> int:
        """Tokens that the prompt and its answer can come to."""
        return len(self.prompt) + self.sampling.max_tokens

    def cancel(self) -> None:
        """Ask the engine to drop the request; it leaves at the next step."""
        self.is_cancelled = True
