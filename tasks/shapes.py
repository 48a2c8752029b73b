"""The shapes in which people already keep examples, recognised by the fields of a row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..support.errors import DataError
from .example import Turn
from .templates import Template, as_text


@dataclass(frozen=True)
class Shape:
    """Fields that belong together, as the templates that read them; `labels`: the answers are a closed set."""

    prompt: str
    target: str
    labels: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*Template(self.prompt).fields, *Template(self.target).fields)))


# The first whose fields a row has is taken, so the more specific ones stand first.
SHAPES = (
    Shape("{instruction}\n{input}\nAnswer:", "{output}"),
    Shape("{instruction}\nAnswer:", "{output}"),
    Shape("{instruction}\nAnswer:", "{response}"),
    Shape("{prompt}", "{completion}"),
    Shape("{prompt}", "{response}"),
    Shape("{input}\nAnswer:", "{target}"),
    Shape("{input}\nAnswer:", "{output}"),
    Shape("{input}\nAnswer:", "{label}", labels=True),
    Shape("{text}\nAnswer:", "{label}", labels=True),
    Shape("{sentence}\nAnswer:", "{label}", labels=True),
    Shape("{sentence1}\n{sentence2}\nAnswer:", "{label}", labels=True),
    Shape("{premise}\n{hypothesis}\nAnswer:", "{label}", labels=True),
    Shape("{question}\nAnswer:", "{answer}"),
)
_CHAT_FIELDS = ("messages", "conversations")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def detect_shape(row: Mapping[str, Any], where: str) -> Shape:
    """The shape whose fields `row` has.

    Raises:
        DataError: when it has none; the message lists its fields.
    """
    for shape in SHAPES:
        if all(field in row for field in shape.fields):
            return shape
    known = ", ".join("/".join(shape.fields) for shape in SHAPES)
    raise DataError(
        f"{where}: the fields {', '.join(map(str, row)) or '(none)'} have no known shape; give the task a `prompt` and "
        f"a `target` template, or use one of: messages, {known}"
    )


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation: `messages`, `conversations`, or `prompt` and `completion` as messages."""
    return any(field in row for field in _CHAT_FIELDS) or isinstance(row.get("prompt"), list)


def chat_turns(row: Mapping[str, Any], where: str, *, train_all: bool) -> tuple[Turn, ...]:
    """The turns of a conversation up to its last assistant turn; every assistant turn of the answer is trained.

    Raises:
        DataError: for messages without role or text, and for a conversation without an assistant turn.
    """
    field = next((field for field in _CHAT_FIELDS if field in row), None)
    if field:
        turns = [_turn(message, where, train_all, True) for message in _messages(row, field, where)]
    else:
        turns = [_turn(message, where, train_all, False) for message in _messages(row, "prompt", where)]
        turns += [_turn(message, where, train_all, True) for message in _messages(row, "completion", where)]
    while turns and turns[-1].role != "assistant":
        turns.pop()  # nothing answers them, so there is nothing to learn from them
    if not turns or not any(turn.trained for turn in turns):
        raise DataError(f"{where}: the conversation has no assistant turn to learn from")
    return tuple(turns)


def _messages(row: Mapping[str, Any], field: str, where: str) -> list[Any]:
    messages = row.get(field)
    if not isinstance(messages, list):
        raise DataError(f"{where}: field {field!r} must be a list of messages with `role` and `content`")
    return messages


def _turn(message: Any, where: str, train_all: bool, learn: bool) -> Turn:
    keys = ("role", "content") if isinstance(message, Mapping) and "role" in message else ("from", "value")
    if not isinstance(message, Mapping) or not all(key in message for key in keys):
        raise DataError(f"{where}: a message needs `role` and `content`, this one is {str(message)[:80]!r}")
    role = as_text(message[keys[0]], f"{where}: {keys[0]!r} of a message")
    text = as_text(message[keys[1]], f"{where}: {keys[1]!r} of a message")
    role = _ROLES.get(role, role)
    if role == "assistant" and not text.strip():
        raise DataError(f"{where}: an assistant turn is empty")
    return Turn(role, text, train_all or (learn and role == "assistant"))
