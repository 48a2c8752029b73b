"""Answers as OpenAI's clients read them: whole or in pieces, as completions or as chat."""

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ..request import Chunk, Finished, TokenChoice
from .selection import Selection

Json = dict[str, Any]


@dataclass
class Answer:
    """One answer as far as it has come."""

    selection: Selection
    text: str = ""
    tokens: list[TokenChoice] = field(default_factory=list)
    end: Finished | None = None

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.tokens.extend(chunk.tokens)


class CompletionFormat:
    """POST /v1/completions."""

    prefix, whole_object, piece_object = "cmpl", "text_completion", "text_completion"

    def __init__(self) -> None:
        self._offsets: dict[int, int] = {}

    def whole(self, answer: Answer) -> Json:
        return {"text": answer.text, "logprobs": self._logprobs(answer.tokens, 0)}

    def begin(self) -> Json | None:
        """What opens a stream, if anything does."""
        return None

    def piece(self, index: int, chunk: Chunk) -> Json:
        at = self._offsets.get(index, 0)
        self._offsets[index] = at + sum(len(token.text) for token in chunk.tokens)
        return {"text": chunk.text, "logprobs": self._logprobs(chunk.tokens, at)}

    def last(self) -> Json:
        return {"text": "", "logprobs": None}

    @staticmethod
    def _logprobs(tokens: Sequence[TokenChoice], at: int) -> Json | None:
        if not tokens:
            return None
        offsets = []
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text: logprob for _, text, logprob in token.top} for token in tokens],
            "text_offset": offsets,
        }


class ChatFormat:
    """POST /v1/chat/completions."""

    prefix, whole_object, piece_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, answer: Answer) -> Json:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(answer.tokens)}

    def begin(self) -> Json | None:
        """What opens a stream, if anything does."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, index: int, chunk: Chunk) -> Json:
        return {"delta": {"content": chunk.text}, "logprobs": self._logprobs(chunk.tokens)}

    def last(self) -> Json:
        return {"delta": {}, "logprobs": None}

    @classmethod
    def _logprobs(cls, tokens: Sequence[TokenChoice]) -> Json | None:
        if not tokens:
            return None
        listed = [
            {
                **cls._one(token.text, token.logprob),
                "top_logprobs": [cls._one(text, logprob) for _, text, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": listed, "refusal": None}

    @staticmethod
    def _one(text: str, logprob: float | None) -> Json:
        bytes_ = None if "\ufffd" in text else list(text.encode())  # what is a part of a character has no text
        return {"token": text, "logprob": logprob, "bytes": bytes_}


Format = CompletionFormat | ChatFormat


class Writer:
    """Writes the objects of one request.

    Args:
        model: as the client named it.
    """

    def __init__(self, format_: Format, model: str, answers: Sequence[Answer]) -> None:
        self.format, self.answers = format_, answers
        self._head = {"id": f"{format_.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self) -> Json:
        """The object of all answers, once they are whole."""
        choices = [self._choice(number, self.format.whole(answer)) for number, answer in enumerate(self.answers)]
        return {**self._head, "object": self.format.whole_object, "choices": choices, "usage": usage(self.answers)}

    def piece(self, number: int, content: Mapping[str, Any]) -> Json:
        """A chunk with a part of one answer."""
        return {**self._head, "object": self.format.piece_object, "choices": [self._choice(number, content)]}

    def usage(self) -> Json:
        """The chunk that tells the tokens of all answers."""
        return {**self._head, "object": self.format.piece_object, "choices": [], "usage": usage(self.answers)}

    def _choice(self, number: int, content: Mapping[str, Any]) -> Json:
        answer = self.answers[number]
        reason = answer.end.reason if answer.end is not None else None
        return {"index": number, **content, "finish_reason": reason, **_answered_by(answer.selection)}


def usage(answers: Sequence[Answer]) -> Json:
    """Tokens of all answers; a prompt that is answered several times counts once."""
    ends = [answer.end for answer in answers if answer.end is not None]
    prompts = {id(a.selection): a.end for a in answers if a.end is not None}.values()
    prompt, made = sum(end.prompt_tokens for end in prompts), sum(end.completion_tokens for end in ends)
    cached = sum(end.cached_tokens for end in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def answer_headers(selections: Sequence[Selection]) -> dict[str, str]:
    """Headers that name what answered, as far as it is the same for all prompts: proxies take no long ones."""
    told = {
        "X-Loramux-Adapter": {quote(selection.name, safe="+") for selection in selections},
        "X-Loramux-Weight": {f"{selection.weight:.4f}" for selection in selections},
        "X-Loramux-Generation": {quote(selection.route.weights, safe="+*:") for selection in selections},
    }
    return {header: values.pop() for header, values in told.items() if len(values) == 1}


def _answered_by(selection: Selection) -> Json:
    told: Json = {
        "adapter": selection.name,
        "adapter_weight": selection.weight,
        "adapter_generation": selection.route.weights,
    }
    return {**told, "adapter_weights": dict(selection.weights)} if selection.weights else told
