"""From examples to token ids, such that the prompt's ids in generation are the ones it has in training.

A prompt is tokenised on its own and an answer as the continuation of the prompt's last word. Tokenising both in one
string would let a merge reach over the border, and the model would be asked to continue ids that it never saw.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..support.errors import DataError
from .example import Example
from .rendering import Rendered, render
from .task import Task

Ids = tuple[int, ...]
OptionsKey = tuple[str, str, str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids.

    Attributes:
        input_ids: prompt and answer, with the end of sequence.
        trained: which of them the loss covers.
        prompt_length: how many ids stand before the last answer.
        choices: ids of every option in order, with the end of sequence; they continue the same prompt.
    """

    input_ids: Ids
    trained: tuple[bool, ...]
    prompt_length: int
    choices: tuple[Ids, ...] | None = None

    @property
    def prompt(self) -> "Encoded":
        """What generation starts from; nothing in it is trained."""
        return Encoded(self.input_ids[: self.prompt_length], (False,) * self.prompt_length, self.prompt_length)

    def options(self) -> "list[Encoded]":
        """The prompt continued with every option, of which alone the log-likelihood counts."""
        prompt, length = self.input_ids[: self.prompt_length], self.prompt_length
        masks = ((False,) * length + (True,) * len(choice) for choice in self.choices or ())
        return [Encoded(prompt + choice, mask, length) for choice, mask in zip(self.choices or (), masks, strict=True)]


@dataclass(frozen=True)
class EncodedTask:
    """A task for one tokenizer; `examples[split][i]` is what `splits[split][i]` was made from.

    Attributes:
        too_long: per split, how many examples were left out for being longer than the model takes.
        stop_ids: tokens that end an answer; generation stops at any of them.
    """

    task: Task
    splits: dict[str, tuple[Encoded, ...]]
    examples: dict[str, tuple[Example, ...]]
    too_long: dict[str, int]
    stop_ids: Ids

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every training example."""
        return tuple(len(encoded.input_ids) for encoded in self.splits["train"])

    def split_used(self, wanted: str) -> str:
        """`wanted`, or `validation` where the source has no such split."""
        return wanted if wanted in self.splits else "validation"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should be told: how the splits came about, and which examples were left out."""
        left_out = (
            f"{count} of {count + len(self.splits[split])} {split} examples left out: longer than the model takes"
            for split, count in self.too_long.items()
            if count
        )
        alike = (
            f"{count} {split} examples have options that this tokenizer writes alike, so they cannot be told apart"
            for split, items in self.splits.items()
            if (count := sum(len(set(item.choices or ())) < len(item.choices or ()) for item in items))
        )
        return (*self.task.notes, *left_out, *alike)


def encode(example: Example, tokenizer: Any, *, max_length: int, chat_template: bool | None = None) -> Encoded | None:
    """One example as token ids, or None when it (or one of its options) is longer than `max_length` tokens.

    Args:
        tokenizer: a fast transformers tokenizer with an end-of-sequence token.
        chat_template: write the prompt in the tokenizer's chat template; None: when it has one.

    Raises:
        DataError: for a tokenizer without end of sequence, or a chat template that does not fit.
    """
    return encode_many([example], tokenizer, max_length=max_length, chat_template=chat_template)[0]


def encode_many(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int, chat_template: bool | None = None
) -> list[Encoded | None]:
    """`encode` for many examples at once, in one batched call of the tokenizer."""
    rendered = [render(example, tokenizer, chat_template) for example in examples]
    encoder = _Encoder(tokenizer)
    encoder.prepare(examples, rendered)
    encoded = (encoder.encode(e, r) for e, r in zip(examples, rendered, strict=True))
    return [one if _longest(one) <= max_length else None for one in encoded]


def encode_task(task: Task, tokenizer: Any, *, max_length: int) -> EncodedTask:
    """All splits of a task as token ids; examples that are too long are counted and left out, never cut.

    Raises:
        DataError: naming the task, also when a split has nothing left.
    """
    splits, examples, too_long = {}, {}, {}
    for split, items in task.splits.items():
        try:
            encoded = encode_many(items, tokenizer, max_length=max_length, chat_template=task.config.chat_template)
        except DataError as error:
            raise DataError(f"task {task.name!r}: {error}") from None
        kept = [(example, one) for example, one in zip(items, encoded, strict=True) if one is not None]
        if not kept:
            raise DataError(
                f"task {task.name!r}: all {len(items)} {split} examples are longer than {max_length} tokens"
            )
        examples[split], splits[split] = (tuple(column) for column in zip(*kept, strict=True))
        too_long[split] = len(items) - len(kept)
    stop_ids = tuple(sorted({one.input_ids[-1] for one in splits["train"]}))
    return EncodedTask(task, splits, examples, too_long, stop_ids)


def as_written(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Texts as this tokenizer can write them: encoded and decoded again.

    References pass through it before they are compared with generated text: an uncased vocabulary cannot produce the
    capitals of "Jack White", and that is the base's limit rather than a fault of the adapter.
    """
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _longest(encoded: Encoded) -> int:
    options = (encoded.prompt_length + len(choice) for choice in encoded.choices or ())
    return max(len(encoded.input_ids), *options, 0)


class _Encoder:
    """Tokenises each distinct text once, all of them in one batch."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token, so no answer could end; set its eos_token")
        self.end: Ids = (tokenizer.eos_token_id,)
        self.beginning = self._beginning()
        self.ids: dict[str, Ids] = {}
        self.options: dict[OptionsKey, tuple[Ids, ...]] = {}

    def prepare(self, examples: Sequence[Example], rendered: Sequence[Rendered]) -> None:
        wanted: dict[str, None] = {}
        for example, one in zip(examples, rendered, strict=True):
            wanted[one.segments[0].text] = None
            for previous, segment in pairwise(one.segments):
                tail = _last_word(previous.text)
                wanted |= {tail: None, tail + segment.text: None}
            if example.choices and _options_key(example, one) not in self.options:
                wanted |= {tail + text: None for text in _option_texts(example, one)}
                self.options[_options_key(example, one)] = ()
        self._tokenise(wanted)

    def encode(self, example: Example, rendered: Rendered) -> Encoded:
        ids: list[int] = list(self.beginning) if rendered.special else []
        trained = [False] * len(ids)
        prompt_length, previous = 0, ""
        for index, segment in enumerate(rendered.segments):
            piece = self._continue(previous, segment.text) if index else self._lookup(segment.text)
            piece = piece + self.end if segment.ends else piece
            prompt_length = len(ids)
            ids += piece
            trained += [segment.trained] * len(piece)
            previous = segment.text
        if not prompt_length:
            raise DataError("the prompt has no tokens and the tokenizer adds no beginning of sequence")
        return Encoded(tuple(ids), tuple(trained), prompt_length, self._choices(example, rendered))

    def _choices(self, example: Example, rendered: Rendered) -> tuple[Ids, ...] | None:
        if example.choices is None:
            return None
        key = _options_key(example, rendered)
        if not self.options[key]:
            previous, answer = rendered.segments[-2:]
            end = self.end if answer.ends else ()
            texts = _option_texts(example, rendered)
            self.options[key] = tuple(self._continue(previous.text, text) + end for text in texts)
        return self.options[key]

    def _continue(self, previous: str, text: str) -> Ids:
        """The ids of `text` as it is written after `previous`."""
        tail = _last_word(previous)
        head, both = self._lookup(tail), self._lookup(tail + text)
        return both[len(head) :] if both[: len(head)] == head else self._lookup(text)

    def _lookup(self, text: str) -> Ids:
        if text not in self.ids:
            self._tokenise([text])
        return self.ids[text]

    def _tokenise(self, texts: Iterable[str]) -> None:
        listed = [text for text in texts if text not in self.ids]
        if listed:
            options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
            ids = self.tokenizer(listed, add_special_tokens=False, **options)["input_ids"]
            self.ids.update(zip(listed, map(tuple, ids), strict=True))

    def _beginning(self) -> Ids:
        """What the tokenizer puts before a text (not what some put after it: an answer follows a prompt)."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return tuple(full[:start])


def _last_word(text: str) -> str:
    """The end of a text that decides how a continuation is segmented: its last word and what white space follows."""
    words = text.rstrip()[-64:].split()
    return text[text.rindex(words[-1]) :] if words else text


def _options_key(example: Example, rendered: Rendered) -> OptionsKey:
    """Examples that agree in this have the same option ids."""
    return _last_word(rendered.segments[-2].text), rendered.before, rendered.after, example.choices or ()


def _option_texts(example: Example, rendered: Rendered) -> list[str]:
    return [rendered.before + choice + rendered.after for choice in example.choices or ()]
