"""A task: named examples in splits, built from rows by the task's templates or by the rows' own shape."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..support.config import parse
from ..support.errors import DataError
from .config import SPLITS, TaskConfig
from .example import Example
from .metrics import check_metrics
from .reader import Reader
from .sources import Rows, read_objects, read_source

CLOSED_METRICS = ("accuracy", "macro_f1")
OPEN_METRICS = ("exact_match", "rouge_l")


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

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what training depends on: training and validation examples and how both are written and judged.

        Test examples do not count: a finished run may be measured on more of them.
        """
        return self.fingerprint_of("train", "validation")

    def fingerprint_of(self, *splits: str) -> str:
        """A hash of the examples in these splits and how they are written and judged."""
        settings = (self.name, self.config.chat_template, self.config.max_new_tokens, self.metrics[0])
        digest = hashlib.sha256(json.dumps(settings).encode())
        for split in splits:
            for example in self.splits[split]:
                turns = [(turn.role, turn.text, turn.trained) for turn in example.turns]
                digest.update(json.dumps((split, turns, example.target, example.choices)).encode())
        return digest.hexdigest()

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
    check_metrics(config.metrics or (), where=f"task {config.name!r}")
    reader = Reader(config, rows)
    splits, notes = _make_splits(config, rows, reader)
    metrics = config.metrics or _default_metrics(splits["train"])
    return Task(dataclasses.replace(reader.resolved, metrics=metrics), splits, notes)


def _default_metrics(train: Sequence[Example]) -> tuple[str, ...]:
    """By kind of answer; an average over answers says nothing when every row has its own options."""
    if train[0].choices is None:
        return OPEN_METRICS
    return CLOSED_METRICS if len({example.choices for example in train}) == 1 else CLOSED_METRICS[:1]


def _make_splits(
    config: TaskConfig, rows: dict[str, Rows], reader: Reader
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
