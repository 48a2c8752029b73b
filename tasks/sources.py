"""Reading rows: files, `datasets`, generators and Python objects. Everything read is data; nothing is executed."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..support.errors import DataError, did_you_mean
from .config import SPLITS, SourceConfig

Row = Mapping[str, Any]
_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Rows:
    """The rows of one split and what their source tells about them.

    Attributes:
        origin: file or dataset, the first word of every message about a row.
        numbers: line (files with lines) or position (others) of each row, counted from 1.
        labels: the closed answer set, where the source names one.
        class_names: for columns that hold class numbers, the names of the classes.
    """

    origin: str
    items: Sequence[Row]
    numbers: Sequence[int]
    unit: str = "row"
    labels: tuple[str, ...] | None = None
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def where(self, index: int) -> str:
        return f"{self.origin}, {self.unit} {self.numbers[index]}"

    def row(self, index: int) -> Row:
        """One row, with class numbers replaced by their names."""
        row = self.items[index]
        if not isinstance(row, Mapping):
            raise DataError(f"{self.where(index)}: a row must be a mapping of field names, not {str(row)[:80]!r}")
        return {**row, **{key: self._class_name(index, key) for key in self.class_names}}

    def select(self, indices: Sequence[int]) -> "Rows":
        return replace(self, items=[self.items[i] for i in indices], numbers=[self.numbers[i] for i in indices])

    def _class_name(self, index: int, key: str) -> Any:
        value, names = self.items[index][key], self.class_names[key]
        if not isinstance(value, int):
            return value
        if not 0 <= value < len(names):
            raise DataError(
                f"{self.where(index)}: field {key!r} is {value}, which is not one of the {len(names)} classes; "
                "if this split has no labels, name another one in source.splits"
            )
        return names[value]


def read_source(source: SourceConfig) -> dict[str, Rows]:
    """The rows of every split the source has.

    Raises:
        DataError: naming file and line, or the dataset, for whatever cannot be read; also for an empty split.
    """
    if source.generated is not None:
        found = _read_generated(source.generated)
    elif source.path is not None:
        found = _read_path(Path(source.path), source)
    elif source.dataset is not None:
        found = _read_dataset(source)
    else:
        raise DataError("the task has no source: give source.path, source.dataset or source.generated")
    return _not_empty(found)


def read_objects(rows: Any, name: str) -> dict[str, Rows]:
    """Rows given in Python: one iterable of mappings or `datasets.Dataset` (train), or a mapping of splits to those.

    Raises:
        DataError: for unknown split names and empty splits.
    """
    splits = rows if isinstance(rows, Mapping) else {"train": rows}
    for split in splits:
        if split not in SPLITS:
            raise DataError(f"task {name!r}: unknown split {split!r}; {did_you_mean(str(split), SPLITS)}")
    return _not_empty({split: as_rows(items, f"{name} ({split})") for split, items in splits.items()})


def as_rows(items: Iterable[Any], origin: str) -> Rows:
    """Rows of any iterable; class names are kept when it is a `datasets.Dataset`."""
    features = getattr(items, "features", None) or {}
    names = {key: tuple(f.names) for key, f in features.items() if type(f).__name__ == "ClassLabel" and f.names}
    listed = list(items)
    return Rows(origin, listed, range(1, len(listed) + 1), class_names=names)


def read_file(path: Path) -> Rows:
    """The rows of one file, by its suffix.

    Raises:
        DataError: naming file and line.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(_READERS)}")
    try:
        return replace(reader(path), labels=_labels_beside(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _not_empty(found: dict[str, Rows]) -> dict[str, Rows]:
    for split, rows in found.items():
        if not len(rows):
            raise DataError(f"{rows.origin}: the {split} split has no rows")
    return found


def _read_generated(name: str) -> dict[str, Rows]:
    from .generated import rows

    return {split: as_rows(rows(name, split), f"generated task {name} ({split})") for split in SPLITS}


def _read_path(path: Path, source: SourceConfig) -> dict[str, Rows]:
    if any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        return _read_saved_dataset(path, source)
    if path.is_dir():
        return {split: read_file(file) for split, file in split_files(path, source).items()}
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    return {"train": read_file(path)}


def _read_saved_dataset(path: Path, source: SourceConfig) -> dict[str, Rows]:
    """A folder that `Dataset.save_to_disk` wrote."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a readable saved dataset ({error})") from None
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    names = _split_names(source, splits, str(path))
    return {split: as_rows(splits[name], f"{path} ({name})") for split, name in names.items()}


def split_files(folder: Path, source: SourceConfig) -> dict[str, Path]:
    """Which file of a folder holds which split."""
    files = {p.name: p for p in sorted(folder.iterdir()) if p.suffix.lower() in _READERS}
    files = {**{p.stem: p for p in reversed(files.values())}, **files}
    return {split: files[name] for split, name in _split_names(source, files, str(folder)).items()}


def _split_names(source: SourceConfig, present: Iterable[str], origin: str) -> dict[str, str]:
    present = list(present)
    found: dict[str, str] = {}
    for split in SPLITS:
        asked = getattr(source.splits, split)
        if asked is not None and asked not in present:
            raise DataError(f"{origin}: no split {asked!r} (source.splits.{split}); {did_you_mean(asked, present)}")
        name = asked or next((alias for alias in _ALIASES[split] if alias in present), None)
        if name is not None:
            found[split] = name
    return found


def _read_dataset(source: SourceConfig) -> dict[str, Rows]:
    import datasets

    wanted = f"dataset {source.dataset!r}" + (f" ({source.name})" if source.name else "")
    try:
        loaded = datasets.load_dataset(str(source.dataset), source.name, revision=source.revision)
    except Exception as error:  # whatever the hub, the network or a format raises, the user needs the dataset's name
        raise DataError(f"{wanted} cannot be loaded: {type(error).__name__}: {error}") from error
    names = _split_names(source, loaded, wanted)
    return {split: as_rows(loaded[name], f"{wanted}, split {name}") for split, name in names.items()}


def _read_json_lines(path: Path) -> Rows:
    items, numbers = [], []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                items.append(_parse_json(line.strip(), f"{path}, line {number}"))
                numbers.append(number)
                if not isinstance(items[-1], dict):
                    raise DataError(f"{path}, line {number}: a row must be a JSON object, not {line.strip()[:60]!r}")
    return Rows(str(path), items, numbers, unit="line")


def _read_json(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    first, *others = text.strip().split("\n", 1)
    if others and first.startswith("{") and first.endswith("}"):
        return _read_json_lines(path)  # JSON lines under the suffix .json are common
    items = _parse_json(text, str(path))
    if not isinstance(items, list):
        raise DataError(f"{path}: a .json file must hold a list of rows (JSON lines belong in .jsonl)")
    return as_rows(items, str(path))


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{where}{line}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not usable JSON ({error})") from None


def _read_csv(path: Path) -> Rows:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        pairs = list(_csv_rows(reader, path))
    return Rows(str(path), [row for _, row in pairs], [number for number, _ in pairs], unit="line")


def _csv_rows(reader: "csv.DictReader[str]", path: Path) -> Iterator[tuple[int, Row]]:
    try:
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise DataError(f"{path}, line {reader.line_num}: not the {columns} cells that the header names")
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: {error}") from None


def _read_parquet(path: Path) -> Rows:
    import datasets
    import pyarrow
    from pyarrow import parquet

    try:
        return as_rows(datasets.Dataset(parquet.read_table(path)), str(path))
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def _labels_beside(path: Path) -> tuple[str, ...] | None:
    """The answer set in `labels.json` next to the file."""
    file = path.parent / "labels.json"
    if not file.is_file() or file == path:
        return None
    labels = _parse_json(file.read_text(encoding="utf-8-sig"), str(file))
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{file}: must be a JSON list of answers")
    return tuple(dict.fromkeys(labels))


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
