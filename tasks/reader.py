"""Rows to examples: by the task's templates, or by the shape of the first row."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..support.errors import DataError, did_you_mean
from .config import TaskConfig
from .example import Example, Turn
from .shapes import Shape, chat_turns, detect_shape, is_chat
from .sources import Row, Rows
from .templates import Template, as_text, look_up

# A label column with more distinct values than this is free text, not a closed answer set.
MAX_LABELS = 1000
Options = tuple[str, ...]


class Reader:
    """Reads the rows of one task; what its first training row and its labels tell is worked out once.

    Raises:
        DataError: naming file and line, for rows that do not fit.
        ConfigError: for malformed templates.
    """

    def __init__(self, config: TaskConfig, splits: Mapping[str, Rows]) -> None:
        self.config = config
        train = splits["train"]
        first, where = train.row(0), train.where(0)
        self.chat = config.prompt is None and config.target is None and is_chat(first)
        known = self.chat or None not in (config.prompt, config.target)
        self.shape = Shape("", "") if known else detect_shape(first, where)
        self.prompt = Template(self.shape.prompt if config.prompt is None else config.prompt)
        self.target = Template(self.shape.target if config.target is None else config.target)
        self.options_field = self._options_field(first)
        self.options = None if self.options_field else self._fixed_options(splits)

    @property
    def resolved(self) -> TaskConfig:
        """The config with the templates that the shape of the rows gave."""
        if self.chat:
            return self.config
        return dataclasses.replace(self.config, prompt=self.prompt.text, target=self.target.text)

    def examples(self, rows: Rows) -> tuple[Example, ...]:
        return tuple(self._example(rows.row(index), rows.where(index)) for index in range(len(rows)))

    def _example(self, row: Row, where: str) -> Example:
        train_all = self.config.train_on == "all"
        if self.chat:
            turns = chat_turns(row, where, train_all=train_all)
            return Example(turns, *self._answer(turns[-1].text.strip(), row, where))
        prompt, target = self.prompt.render(row, where), self.target.render(row, where)
        if not prompt.strip():
            raise DataError(f"{where}: the prompt is empty")
        answer, choices = self._answer(target.strip(), row, where)
        prompt, space = self._border(prompt, target)
        turns = (Turn("prompt", prompt, train_all), Turn("answer", space + answer, True))
        return Example(turns, answer, choices)

    def _border(self, prompt: str, target: str) -> tuple[str, str]:
        """The prompt without spaces at its end, and the white space that the answer starts with.

        Nearly every vocabulary has the space before a word in the word's own token; left in the prompt it would force
        a segmentation that the base never saw.
        """
        kept = prompt.rstrip(" ")
        space = prompt[len(kept) :] + target[: len(target) - len(target.lstrip())]
        return kept, space if space or prompt[-1:].isspace() else self.config.delimiter

    def _answer(self, target: str, row: Row, where: str) -> tuple[str, Options | None]:
        options = self._row_options(row, where) if self.options_field else self.options
        target = self._option_meant(target, options, row) if options else target
        if not target:
            raise DataError(f"{where}: the answer is empty; write what the model should say, for example 'none'")
        if options is not None and target not in options:
            hint = did_you_mean(target, options)
            raise DataError(f"{where}: the answer {target!r} is not among the {len(options)} choices; {hint}")
        # Published multiple-choice sets do repeat an option within a row.
        return target, None if options is None else tuple(dict.fromkeys(options))

    def _option_meant(self, target: str, options: Options, row: Row) -> str:
        """The option that a class number stands for.

        An option that reads like the number comes first, unless the row has its options as texts and the answer as a
        number: then it is a position, whatever the options read like.
        """
        if not target.isdecimal() or int(target) >= len(options):
            return target
        return options[int(target)] if target not in options or self._is_position(row) else target

    def _is_position(self, row: Row) -> bool:
        if self.options_field is None or self.target.only_field is None:
            return False
        answer, options = look_up(row, self.target.only_field), look_up(row, self.options_field)
        return isinstance(answer, int) and all(isinstance(option, str) for option in options)

    def _row_options(self, row: Row, where: str) -> Options:
        field = str(self.options_field)
        try:
            values: Any = look_up(row, field)
        except KeyError:
            hint = did_you_mean(field, map(str, row))
            raise DataError(f"{where}: no field {field!r}, which should hold the choices; {hint}") from None
        if not isinstance(values, list | tuple) or not values:
            raise DataError(f"{where}: field {field!r} must be a list of choices, not {values!r}")
        return tuple(as_text(value, f"{where}: a choice in {field!r}").strip() for value in values)

    def _options_field(self, first: Row) -> str | None:
        if isinstance(self.config.choices, str):
            return self.config.choices
        automatic = self.config.choices is None and isinstance(first.get("choices"), list)
        return "choices" if automatic else None

    def _fixed_options(self, splits: Mapping[str, Rows]) -> Options | None:
        if self.config.choices is not None:
            return tuple(choice.strip() for choice in self.config.choices) or None
        train = splits["train"]
        if train.labels is not None:
            return train.labels
        if (names := train.class_names.get(self.target.only_field or "")) is not None:
            return tuple(names)
        return self._labels_seen(splits) if self.shape.labels and self.config.target is None else None

    def _labels_seen(self, splits: Mapping[str, Rows]) -> Options | None:
        seen = {
            self.target.render(rows.row(i), rows.where(i)).strip() for rows in splits.values() for i in range(len(rows))
        }
        return tuple(sorted(seen)) if len(seen) <= MAX_LABELS else None
