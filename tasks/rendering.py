"""From an example to the pieces of text that are tokenised: plain, or in the tokenizer's chat template."""

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from ..support.errors import DataError
from .example import Example, Segment, plain_segments


@dataclass(frozen=True)
class Rendered:
    """Pieces of text; the last is the answer, `before + target + after`, so another option can take its place.

    `special`: the tokenizer adds its own beginning (chat templates write theirs).
    """

    segments: tuple[Segment, ...]
    before: str
    after: str
    special: bool


def render(example: Example, tokenizer: Any, chat_template: bool | None = None) -> Rendered:
    """The text of an example for one tokenizer.

    Args:
        chat_template: use the tokenizer's chat template; None: when it has one.

    Raises:
        DataError: when it is wanted and the tokenizer has none, or when it cannot write this conversation.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat_template and not template:
        raise DataError("chat_template: true, but the tokenizer has no chat template; set it to false")
    if template and chat_template is not False:
        return _render_chat(example, tokenizer)
    segments = tuple(plain_segments(example))
    answer = segments[-1].text
    return Rendered(segments, answer[: len(answer) - len(answer.lstrip())], "", special=True)


def _render_chat(example: Example, tokenizer: Any) -> Rendered:
    messages, learnt = _messages(example)
    whole = _apply(tokenizer, messages, False)
    segments: list[Segment] = []
    position, before, after = 0, "", ""
    for index in learnt:
        message = messages[index]
        head = _apply(tokenizer, messages[:index], True)
        start = whole.find(message["content"], len(head)) if whole.startswith(head) else -1
        if start < position:
            raise DataError(
                f"the tokenizer's chat template rewrites earlier turns or the answer {message['content'][:60]!r}, so "
                "the answer cannot be told from the prompt; set chat_template: false"
            )
        end = start + len(message["content"])
        before, after = whole[len(head) : start], _end_marker(whole[end:], tokenizer)
        segments.append(Segment(whole[position : len(head)], _all_trained(example)))
        position = end + len(after)
        segments.append(Segment(whole[len(head) : position], True, ends=not after))
    return Rendered(tuple(segments), before, after, special=False)


def _messages(example: Example) -> tuple[list[dict[str, str]], list[int]]:
    """An example as chat messages, and which of them are learnt answers; the last one always is."""
    roles = {"prompt": "user", "answer": "assistant"}
    messages = [{"role": roles.get(t.role, t.role), "content": t.text.strip()} for t in example.turns]
    learnt = [i for i, t in enumerate(example.turns) if t.trained and messages[i]["role"] == "assistant"]
    return messages, learnt


def _all_trained(example: Example) -> bool:
    return all(turn.trained for turn in example.turns)


def _apply(tokenizer: Any, messages: list[dict[str, str]], generation: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    except (TemplateError, ValueError, IndexError, KeyError) as error:
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise DataError(f"the tokenizer's chat template refuses turns of the roles {roles}: {error}") from None


def _end_marker(rest: str, tokenizer: Any) -> str:
    """The special token that closes a turn, with the white space before it; empty when there is none."""
    text = rest.lstrip()
    for token in sorted(_special_tokens(tokenizer), key=len, reverse=True):
        if text.startswith(token):
            return rest[: len(rest) - len(text)] + token
    return ""


def _special_tokens(tokenizer: Any) -> set[str]:
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {token for token in (*tokenizer.all_special_tokens, *added) if token}
