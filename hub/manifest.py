"""What a published repository says of itself in one small file, for programs; its card says it to people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..support.config import config, parse
from ..support.errors import ConfigError, TrustError
from ..training.report import COLUMNS
from .remote import sha256_of, size_of
from .source import MIXTURE, Source

MANIFEST = "loramux.json"
FORMAT = 1


@config
class Shown:
    """An example on the card."""

    input: str
    answer: str


@config
class PublishedTask:
    """One task's adapter.

    Attributes:
        folder: where in the repository; empty for its root.
        scores: the main metric by column of the results table.
        dataset: the Hub id of its data, where it has one.
    """

    name: str
    folder: str
    description: str = ""
    metric: str = ""
    scores: dict[str, float]
    examples: list[Shown]
    dataset: str | None = None

    def __post_init__(self) -> None:
        if self.folder in (".", "..") or "/" in self.folder or "\\" in self.folder:
            raise ValueError(f"folder (={self.folder!r}) must be the name of a folder, or empty")

    @property
    def named_scores(self) -> dict[str, float]:
        """Scores by metric and column, as the table names it."""
        return {f"{self.metric}, {COLUMNS.get(column, column)}": value for column, value in self.scores.items()}


@config
class PublishedFile:
    bytes: int
    sha256: str


@config
class Manifest:
    """A repository as published: on which base, by which method, what for which task, and every file's hash."""

    format: int = FORMAT
    loramux: str = __version__
    base: str
    base_revision: str | None = None
    base_fingerprint: str | None = None
    method: str = ""
    mixture: str | None = None
    tasks: list[PublishedTask]
    files: dict[str, PublishedFile]


def make_manifest(source: Source, folders: Sequence[str], files: Mapping[str, Path | bytes]) -> Manifest:
    """The manifest of files that are about to be published.

    Args:
        folders: of the source's adapters, in their order.
    """
    return Manifest(
        base=source.base.name,
        base_revision=source.base.revision,
        base_fingerprint=source.environment.get("base_fingerprint"),
        method=source.method,
        mixture=MIXTURE if source.mixture else None,
        tasks=[
            PublishedTask(
                name=adapter.task,
                folder=folder,
                description=adapter.description,
                metric=adapter.metric,
                scores=dict(adapter.scores),
                examples=[Shown(input=e.prompt, answer=e.wanted) for e in adapter.examples],
                dataset=adapter.dataset,
            )
            for adapter, folder in zip(source.adapters, folders, strict=True)
        ],
        files={
            path: PublishedFile(bytes=size_of(content), sha256=sha256_of(content)) for path, content in files.items()
        },
    )


def read_manifest(text: str | None, where: str) -> Manifest | None:
    """The manifest that a repository has; None where it has none, because other tools made it.

    Raises:
        TrustError: it is not what loramux writes.
    """
    if text is None:
        return None
    try:
        data: Any = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise TrustError(f"{where}/{MANIFEST}: format {found!r}; this version of loramux reads {FORMAT}")
        return parse(Manifest, data, where=f"{where}/{MANIFEST}")
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{where}/{MANIFEST}: not readable as JSON"
        raise TrustError(reason) from None


def manifest_of(folder: Path, called: str) -> Manifest | None:
    """The manifest of a folder on this machine, as `read_manifest`."""
    path = folder / MANIFEST
    return read_manifest(path.read_text(encoding="utf-8") if path.is_file() else None, called)
