"""A task: named examples in splits, built from rows by the task's templates or by the rows' own shape."""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..support.config import parse
from ..support.errors import DataError, did_you_mean
from .config import SPLITS, TaskConfig
from .example import Example, Turn
from .metrics import check_metrics
from .shapes import Shape, chat_turns, detect_shape, is_chat
from .sources import Row, Rows, read_objects, read_source
from .templates import Template, as_text, look_up

CLOSED_METRICS = ("accuracy", "macro_f1")
OPEN_METRICS = ("exact_match", "rouge_l")
# A label column with more distinct values than this is free text, not a closed answer set.
MAX_LABELS = 1000


@dataclass(frozen=True)
class Task:
    """Examples in splits `train`, `validation` and, where the source has one, `test`.

    Attributes:
        config: as resolved: templates and metrics that were left out are filled in, paths are absolute.
        notes: what the user should know about how the splits came about.
    """

    config: TaskConfig
    splits: dict[str, Sequence[Example]]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metric names, the main one first."""
        return self.config.metrics or OPEN_METRICS

    @property
    def closed(self) -> bool:
        """Whether answers are chosen from given choices rather than written freely."""
        return self.splits["train"][0].choices is not None

    @property
    def test_split(self) -> str:
        """The split that final evaluation uses: `test`, or `validation` when the source has no test."""
        return "test" if "test" in self.splits else "validation"

    @classmethod
    def from_config(cls, config: TaskConfig) -> "Task":
        """Read the task's source.

        Raises:
            DataError: naming file and line, dataset or key.
            ConfigError: for unknown metrics and malformed templates.
        """
        return _build(config, read_source(config.source))

    @classmethod
    def from_rows(cls, name: str, rows: Any, **options: Any) -> "Task":
        """A task from Python objects.

        Args:
            rows: an iterable of mappings or a `datasets.Dataset` (all of it training data), or a mapping
                (a `DatasetDict`) from "train", "validation" and "test" to such.
            options: the fields of `TaskConfig` except `source`.

        Raises:
            DataError, ConfigError: as `from_config`.
        """
        config = parse(TaskConfig, {**options, "name": name}, where=f"task {name!r}")
        return _build(config, read_objects(rows, name))


def _build(config: TaskConfig, rows: dict[str, Rows]) -> Task:
    if "train" not in rows:
        raise DataError(f"task {config.name!r}: no train split; the source has {', '.join(rows) or 'no known split'}")
    reader = _Reader(config, rows["train"])
    splits, notes = _make_splits(config, rows, reader)
    check_metrics(config.metrics or (), where=f"task {config.name!r}")
    return Task(reader.resolved(splits["train"]), splits, notes)


class _Reader:
    """Turns rows into examples; what the first row and the labels tell is worked out once."""

    def __init__(self, config: TaskConfig, train: Rows) -> None:
        self.config = config
        first, where = train.row(0), train.where(0)
        templated = config.prompt is not None and config.target is not None
        self.chat = not templated and config.prompt is None and config.target is None and is_chat(first)
        self.shape = Shape("", "") if templated or self.chat else detect_shape(first, where)
        self.prompt = Template(self.shape.prompt if config.prompt is None else config.prompt)
        self.target = Template(self.shape.target if config.target is None else config.target)
        self.field = self._choices_field(first, where)
        self.choices = None if self.field else self._fixed_choices(train)

    def resolved(self, train: Sequence[Example]) -> TaskConfig:
        metrics = self.config.metrics or _default_metrics(train)
        if self.chat:
            return dataclasses.replace(self.config, metrics=metrics)
        return dataclasses.replace(self.config, prompt=self.prompt.text, target=self.target.text, metrics=metrics)

    def examples(self, rows: Rows) -> tuple[Example, ...]:
        return tuple(self._example(rows.row(index), rows.where(index)) for index in range(len(rows)))

    def _example(self, row: Row, where: str) -> Example:
        if self.chat:
            turns = chat_turns(row, where, train_all=self.config.train_on == "all")
            return Example(turns, *self._answer(turns[-1].text.strip(), row, where))
        prompt = self.prompt.render(row, where)
        target = self.target.render(row, where)
        if not prompt.strip():
            raise DataError(f"{where}: the prompt is empty")
        answer, choices = self._answer(target.strip(), row, where)
        lead, prompt = self._lead(prompt, target)
        turns = (
            Turn("prompt", prompt, self.config.train_on == "all"),
            Turn("answer", lead + answer, True),
        )
        return Example(turns, answer, choices)

    def _lead(self, prompt: str, target: str) -> tuple[str, str]:
        """The white space between prompt and answer, and the prompt without it.

        Spaces at the prompt's end belong to the answer's first token in nearly every vocabulary; left in the prompt
        they would force a segmentation the model never saw.
        """
        kept = prompt.rstrip(" ")
        own = target[: len(target) - len(target.lstrip())]
        lead = prompt[len(kept) :] + own
        return (lead if lead or prompt[-1:].isspace() else self.config.delimiter), kept

    def _answer(self, target: str, row: Row, where: str) -> tuple[str, tuple[str, ...] | None]:
        choices = self._row_choices(row, where) if self.field else self.choices
        if choices and target not in choices and target.isdecimal() and int(target) < len(choices):
            target = choices[int(target)]  # a class number
        if not target:
            raise DataError(f"{where}: the answer is empty; write what the model should say, for example 'none'")
        if choices is not None and target not in choices:
            hint = did_you_mean(target, choices[:20])
            raise DataError(f"{where}: the answer {target!r} is not among the {len(choices)} choices; {hint}")
        return target, choices

    def _row_choices(self, row: Row, where: str) -> tuple[str, ...]:
        try:
            values = look_up(row, str(self.field))
        except KeyError:
            hint = did_you_mean(str(self.field), map(str, row))
            raise DataError(f"{where}: no field {self.field!r}, which should hold the choices; {hint}") from None
        if not isinstance(values, list | tuple) or not values:
            raise DataError(f"{where}: field {self.field!r} must be a list of choices, not {values!r}")
        choices = (as_text(value, f"{where}: a choice in {self.field!r}").strip() for value in values)
        return tuple(dict.fromkeys(choices))  # published multiple-choice sets do repeat an option in a row

    def _choices_field(self, first: Row, where: str) -> str | None:
        if isinstance(self.config.choices, str):
            self.field = self.config.choices
            self._row_choices(first, where)
            return self.config.choices
        automatic = self.config.choices is None and isinstance(first.get("choices"), list)
        return "choices" if automatic else None

    def _fixed_choices(self, train: Rows) -> tuple[str, ...] | None:
        if self.config.choices is not None:
            return tuple(str(choice).strip() for choice in self.config.choices) or None
        if train.labels is not None:
            return train.labels
        label = self.target.fields[0] if self.target.text == f"{{{''.join(self.target.fields)}}}" else ""
        if label in train.class_names:
            return tuple(train.class_names[label])
        return self._labels_seen(train) if self.shape.labels and self.config.target is None else None

    def _labels_seen(self, train: Rows) -> tuple[str, ...] | None:
        seen = {self.target.render(train.row(i), train.where(i)).strip() for i in range(len(train))}
        return tuple(sorted(seen)) if len(seen) <= MAX_LABELS else None


def _default_metrics(train: Sequence[Example]) -> tuple[str, ...]:
    """By kind of answer; an average over answers says nothing when every row has its own options."""
    if train[0].choices is None:
        return OPEN_METRICS
    return CLOSED_METRICS if len({example.choices for example in train}) == 1 else CLOSED_METRICS[:1]


def _make_splits(
    config: TaskConfig, rows: dict[str, Rows], reader: _Reader
) -> tuple[dict[str, Sequence[Example]], tuple[str, ...]]:
    carve = "validation" not in rows
    splits: dict[str, Sequence[Example]] = {}
    notes = []
    for split in (split for split in SPLITS if split in rows):
        # A validation set is carved from all training rows, so the limit on those comes after it.
        wanted = rows[split] if carve and split == "train" else _limited(rows[split], config, split)
        splits[split] = reader.examples(wanted)
    if carve:
        kept, held = _carve(splits["train"], config)
        splits |= {"train": _sample(kept, config, "train"), "validation": _sample(held, config, "validation")}
        notes.append(f"no validation split: {len(held)} of {len(kept) + len(held)} training examples kept aside for it")
    if "test" not in splits:
        notes.append("no test split: final figures are on the validation examples")
    return {split: splits[split] for split in SPLITS if split in splits}, tuple(notes)


def _limited(rows: Rows, config: TaskConfig, split: str) -> Rows:
    chosen = _chosen(len(rows), config, split)
    return rows if chosen is None else rows.select(chosen)


def _sample(examples: Sequence[Example], config: TaskConfig, split: str) -> Sequence[Example]:
    chosen = _chosen(len(examples), config, split)
    return examples if chosen is None else tuple(examples[i] for i in chosen)


def _chosen(count: int, config: TaskConfig, split: str) -> list[int] | None:
    """Which of `count` examples a limit leaves: a fixed random choice, since files are often sorted by label."""
    limit = getattr(config.limit, split)
    if limit is None or limit >= count:
        return None
    return sorted(random.Random(f"{config.name}/{split}").sample(range(count), limit))


def _carve(examples: Sequence[Example], config: TaskConfig) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Split training examples in two such that no prompt is in both, whatever the order of the rows.

    Raises:
        DataError: when there are too few distinct prompts.
    """
    size = min(config.source.validation_size, len(examples) // 5)
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.prompt] = counts.get(example.prompt, 0) + 1
    held: set[str] = set()
    for prompt in sorted(counts, key=_shuffle_key(config.name)):
        if counts[prompt] <= size:
            held.add(prompt)
            size -= counts[prompt]
    if not held:
        raise DataError(
            f"task {config.name!r}: no validation split, and {len(examples)} training examples with {len(counts)} "
            "distinct prompts are too few to keep some aside; give one in source.splits.validation"
        )
    kept = tuple(example for example in examples if example.prompt not in held)
    return kept, tuple(example for example in examples if example.prompt in held)


def _shuffle_key(name: str) -> Callable[[str], bytes]:
    return lambda text: hashlib.sha256(f"{name}\0{text}".encode(errors="surrogatepass")).digest()
