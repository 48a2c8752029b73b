"""Completions and chat completions, whole or streamed."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..errors import ServingError
from ..request import Chunk, Event, Failed, Finished, Sampling
from .answers import Answers, Read, cancelled_with_client, failure, too_late
from .errors import error_body
from .formats import Answer, ChatFormat, CompletionFormat, Format, Writer, answer_headers, usage
from .prompts import chat_ids, listed, prompt_ids
from .schemas import ChatBody, CompletionBody, Generation, ResponseFormat
from .service import Service, service_of

router = APIRouter()
Served = Annotated[Service, Depends(service_of)]
_DEFAULT_TOKENS = 64
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_ANY_OBJECT = '{"type": "object"}'


@router.post("/v1/completions", responses=_STREAMED)
async def completions(body: CompletionBody, request: Request, service: Served) -> Response:
    """Continue one or several prompts."""

    async def read() -> tuple[list[list[int]], Sampling]:
        prompts = await prompt_ids(service, body.prompt)
        tokens = body.max_tokens or min(_DEFAULT_TOKENS, _room(service, prompts))
        return prompts, _sampling(service, body, tokens, body.logprobs)

    return await _answer(service, request, body, len(listed(body.prompt)), read, CompletionFormat())


@router.post("/v1/chat/completions", responses=_STREAMED)
async def chat(body: ChatBody, request: Request, service: Served) -> Response:
    """Answer the last message of a conversation."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ServingError("conflicting_parameters", "top_logprobs goes with logprobs: true")

    async def read() -> tuple[list[list[int]], Sampling]:
        prompts = [await chat_ids(service, body.messages)]
        tokens = body.max_completion_tokens or body.max_tokens or _room(service, prompts)
        return prompts, _sampling(service, body, tokens, (body.top_logprobs or 0) if body.logprobs else None)

    return await _answer(service, request, body, 1, read, ChatFormat())


async def _answer(
    service: Service, request: Request, body: Generation, prompts: int, read: Read, format_: Format
) -> Response:
    if body.stream_options is not None and not body.stream:
        raise ServingError("conflicting_parameters", "stream_options goes with stream: true")
    running = await Answers.begin(service, body, prompts, read)
    made = [Answer(selection) for selection in running.selections for _ in range(body.answers)]
    writer = Writer(format_, body.model, made)
    headers = answer_headers(running.selections)
    request.state.told = {"adapter": ",".join(dict.fromkeys(selection.name for selection in running.selections))}
    async with cancelled_with_client(request, running):
        if not body.stream:
            async for number, event in running.events():
                _take(service, running, made[number], event)
            request.state.told |= _counts(writer)
            return JSONResponse(writer.whole(), headers=headers)
        events = running.events()
        number, event = await anext(events)  # what fails at once has a status of its own
        _take(service, running, made[number], event)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    lines = _lines(service, request, running, writer, events, (number, event), include_usage)
    return StreamingResponse(lines, headers=headers, media_type="text/event-stream")


async def _lines(
    service: Service,
    request: Request,
    running: Answers,
    writer: Writer,
    events: AsyncIterator[tuple[int, Event]],
    first: tuple[int, Event],
    include_usage: bool,
) -> AsyncIterator[str]:
    """The stream of all answers, as server-sent events."""
    try:
        opening = writer.format.begin()
        for number in range(len(writer.answers) if opening is not None else 0):
            yield _line(writer.piece(number, opening or {}))
        yield _piece(writer, *first)
        async for number, event in events:
            _take(service, running, writer.answers[number], event)
            yield _piece(writer, number, event)
        if include_usage:
            yield _line(writer.usage())
        request.state.told |= _counts(writer)
        yield "data: [DONE]\n\n"
    except ServingError as error:
        request.state.error_code = error.code
        yield _line(error_body(error.code, error.message, error.status))
    finally:
        running.cancel()


def _take(service: Service, running: Answers, answer: Answer, event: Event) -> None:
    """Raises ServingError where an answer failed or was not whole in time; the others are dropped then."""
    if isinstance(event, Chunk):
        answer.add(event)
        return
    if isinstance(event, Finished) and event.reason in ("stop", "length"):
        answer.end = event
        return
    running.cancel()
    if isinstance(event, Failed):
        raise failure(event)
    if event.reason == "deadline":
        raise too_late(service)
    if running.was_left:
        raise ServingError("client_closed_request", "the client left before the answer was whole", 499)
    raise ServingError("shutting_down", "the server is shutting down", 503)


def _piece(writer: Writer, number: int, event: Event) -> str:
    content = writer.format.piece(number, event) if isinstance(event, Chunk) else writer.format.last()
    return _line(writer.piece(number, content))


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


def _counts(writer: Writer) -> dict[str, int]:
    told = usage(writer.answers)
    return {key: told[key] for key in ("prompt_tokens", "completion_tokens")}


def _room(service: Service, prompts: list[list[int]]) -> int:
    """Tokens that answers may have where the client does not say."""
    return min(service.config.limits.answer_tokens, service.engine.max_length - max(map(len, prompts)))


def _sampling(service: Service, body: Generation, tokens: int, logprobs: int | None) -> Sampling:
    limit = service.config.limits.answer_tokens
    if tokens > limit:
        raise ServingError("max_tokens_too_large", f"max_tokens (={tokens}) may be at most {limit}")
    biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    if biases and max(biases) >= service.vocabulary:
        raise ServingError("invalid_token", f"logit_bias: token {max(biases)}; the base knows {service.vocabulary}")
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
    }
    return Sampling(
        max_tokens=tokens,
        seed=body.seed,
        stop=body.stops,
        logprobs=logprobs,
        logit_bias=biases,
        schema=_schema(body.response_format),
        ignore_eos=body.ignore_eos,
        **{key: value for key, value in given.items() if value is not None},  # type: ignore[arg-type]
    )


def _schema(wanted: ResponseFormat | None) -> str | None:
    if wanted is None or wanted.type == "text":
        return None
    return _ANY_OBJECT if wanted.json_schema is None else json.dumps(wanted.json_schema.schema_)
