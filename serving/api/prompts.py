"""From what a client sends to token ids that the base knows."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from ...tasks.example import Example, Turn
from ..errors import ServingError
from .schemas import Message
from .service import Service

Given = str | list[str] | list[int] | list[list[int]]


def listed(given: Given) -> Sequence[Any]:
    """One or several prompts, as several."""
    return given if isinstance(given, list) and not isinstance(given[0], int) else [given]


async def prompt_ids(service: Service, given: Given) -> list[list[int]]:
    """The token ids of one or several prompts, given as text or as ids.

    Raises:
        ServingError: a prompt is empty, too long, or holds an id that the base does not know.
    """
    prompts = listed(given)
    if isinstance(prompts[0], str):
        texts = prompts
        prompts = await service.with_text(lambda: [_encode(service, text) for text in texts], sum(map(len, texts)))
    for number, ids in enumerate(prompts):
        _check(service, ids, f"prompt {number}" if len(prompts) > 1 else "the prompt")
    return list(prompts)


async def chat_ids(service: Service, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation, in the base's chat template; a base without one gets `User: ...` lines.

    Raises:
        ServingError: the template refuses these messages, or they are too long.
    """
    characters = sum(len(message.text) for message in messages)
    ids = await service.with_text(lambda: _encode_chat(service, messages), characters)
    _check(service, ids, "the conversation")
    return ids


def _encode(service: Service, text: str) -> list[int]:
    return list(service.tokenizer(text, verbose=False)["input_ids"])


def _encode_chat(service: Service, messages: Sequence[Message]) -> list[int]:
    tokenizer = service.tokenizer
    if not service.has_chat_template:
        turns = (*(Turn(message.role, message.text, False) for message in messages), Turn("assistant", "", True))
        return _encode(service, Example(turns, "").prompt)
    listed = [{"role": message.role, "content": message.text} for message in messages]
    try:
        text = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ServingError("invalid_messages", f"the base's chat template refuses these messages: {error}") from None
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check(service: Service, ids: Sequence[int], what: str) -> None:
    if not ids:
        raise ServingError("empty_prompt", f"{what} has no tokens")
    if len(ids) > service.prompt_limit():
        raise ServingError(
            "context_length_exceeded", f"{what} has {len(ids)} tokens; at most {service.prompt_limit()} are allowed"
        )
    if max(ids) >= service.vocabulary:
        raise ServingError(
            "invalid_token", f"{what} holds token id {max(ids)}; the base knows ids below {service.vocabulary}"
        )
