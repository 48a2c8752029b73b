"""What a task is, as data: where its rows lie, how a row becomes a prompt and an answer, how an answer is judged."""

import re
from typing import Literal

from ..support.config import config
from ..support.errors import ConfigError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# Task names become folder names (exports, checkpoints), so nothing in them may lead out of a folder.
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


@config
class SplitNames:
    """What each split is called at the source; a name given here must exist there.

    Left out, `train`, `validation` (or `valid`, `val`, `dev`) and `test` are looked for.
    """

    train: str | None = None
    validation: str | None = None
    test: str | None = None


@config
class SourceConfig:
    """Where the rows come from: exactly one of `path`, `dataset` and `generated` (none for rows given in Python)."""

    path: str | None = None
    """A .jsonl, .json, .csv, .tsv or .parquet file, or a folder with one per split; relative to the task file."""
    dataset: str | None = None
    """Any id or folder that `datasets.load_dataset` takes. Data only: dataset scripts are never run."""
    name: str | None = None
    """The configuration of `dataset`, such as "sst2" of "glue"."""
    revision: str | None = None
    """The commit, tag or branch of `dataset`."""
    generated: str | None = None
    """One of the tasks that loramux generates itself, see `loramux.tasks.generated`."""
    splits: SplitNames = SplitNames()
    validation_size: int = 200
    """Training rows kept aside when there is no validation split; never more than a fifth of them."""

    def __post_init__(self) -> None:
        given = [key for key in ("path", "dataset", "generated") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ConfigError(f"give one of path, dataset and generated, not {' and '.join(given)}")
        if self.dataset is None and (self.name is not None or self.revision is not None):
            raise ConfigError("name and revision belong to `dataset`, which is not given")
        if self.validation_size < 1:
            raise ConfigError(f"validation_size={self.validation_size} must be at least 1")


@config
class Limits:
    """At most this many examples per split, drawn without replacement, the same ones each time."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None

    def __post_init__(self) -> None:
        for split in SPLITS:
            limit = getattr(self, split)
            if limit is not None and limit < 1:
                raise ConfigError(f"{split}={limit} must be at least 1")


@config
class TaskConfig:
    """One task. Only `name` and `source` are needed when the rows have a known shape (`shapes.py`)."""

    name: str
    """1-64 letters, digits, `_`, `-` and `.`, no leading dot: exports use it as a folder name."""
    source: SourceConfig = SourceConfig()
    prompt: str | None = None
    """Template of the prompt, with row fields as `{field}`; default: by the shape of the rows."""
    target: str | None = None
    """Template of the answer; default: by the shape of the rows."""
    delimiter: str = " "
    """Put between prompt and answer where neither has white space there."""
    choices: str | tuple[str, ...] | None = None
    """The closed answer set: a list, or the field that holds each row's own list. Default: what the source tells
    (a `choices` field, `labels.json` beside the files, class names, the labels that occur). `[]`: answers are open."""
    metrics: tuple[str, ...] | None = None
    """The first one is the task's main metric. Default: accuracy and macro_f1 for a fixed answer set,
    accuracy for choices that differ from row to row, else exact_match and rouge_l."""
    train_on: Literal["answer", "all"] = "answer"
    """Whether the loss covers the answers only or the prompt too."""
    limit: Limits = Limits()
    chat_template: bool | None = None
    """Write prompts in the tokenizer's chat template. Default: when it has one."""
    max_new_tokens: int = 64
    """Where generation of an open answer stops at the latest, in tokens."""
    description: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"task name {self.name!r}: use 1-64 letters, digits, `_`, `-` and `.`, without a leading dot"
            )
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if isinstance(self.choices, tuple) and len(set(self.choices)) < len(self.choices):
            raise ConfigError(f"choices of task {self.name!r}: {_first_repeated(self.choices)!r} stands there twice")


def _first_repeated(values: tuple[str, ...]) -> str:
    return next(value for index, value in enumerate(values) if value in values[:index])
