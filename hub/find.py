"""Finding adapters on a hub, and telling what a repository of them holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import ModelInfo

from ..adapters.lora_folder import CONFIG, WEIGHTS
from .checks import AdapterConfig, listed_adapters, read_adapter_config
from .manifest import MANIFEST, Manifest, read_manifest
from .remote import Commit, Remote, check_name, split_revision
from .signing import ATTESTATION

_METHOD, _BASE = "loramux:", "base_model:adapter:"


@dataclass(frozen=True)
class Found:
    """A repository in a list."""

    repository: str
    base: str
    method: str
    downloads: int
    updated: str


@dataclass(frozen=True)
class Held:
    """One adapter of a repository.

    Attributes:
        folder: below the root, `.` for the root itself.
        scores: by what was measured, from the manifest or else from the card.
    """

    folder: str
    config: AdapterConfig
    size: int
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Described:
    """A repository of adapters at one commit."""

    repository: str
    commit: str
    found: Found
    licence: str
    private: bool
    files: int
    size: int
    is_signed: bool
    adapters: list[Held]


def search(
    remote: Remote,
    text: str | None = None,
    *,
    base: str | None = None,
    method: str | None = None,
    owner: str | None = None,
    limit: int = 20,
) -> list[Found]:
    """Repositories of PEFT adapters, the most downloaded first.

    Raises:
        RemoteError: the hub cannot be asked.
    """
    tags = ["peft", *([_BASE + base] if base else []), *([_METHOD + method] if method else [])]
    with remote.talking():
        listed = remote.api.list_models(filter=tags, search=text, author=owner, sort="downloads", limit=limit)
        return [_found(info) for info in listed]


def describe(name: str, remote: Remote) -> Described:
    """What a repository holds, from its small files alone.

    Args:
        name: `owner/name` or `owner/name@revision`.

    Raises:
        RemoteError: it is not there, or holds no adapters.
        AdapterError, TrustError: what it says of them is not readable.
    """
    repository, revision = split_revision(name)
    commit = remote.commit(check_name(repository), revision)
    manifest = read_manifest(remote.read(repository, commit, MANIFEST), repository)
    card = commit.info.card_data.to_dict() if commit.info.card_data else {}
    scores = _scores(manifest, commit.info)
    adapters = [
        _held(folder, repository, commit, remote, scores) for folder in listed_adapters(commit.files, repository)
    ]
    return Described(
        repository,
        commit.sha,
        _found(commit.info),
        str(card.get("license") or "none given"),
        bool(commit.info.private),
        len(commit.files),
        sum(file.size for file in commit.files.values()),
        ATTESTATION in commit.files,
        adapters,
    )


def _held(
    folder: str, repository: str, commit: Commit, remote: Remote, scores: Mapping[str, Mapping[str, float]]
) -> Held:
    path = str(PurePosixPath(folder) / CONFIG)
    config = read_adapter_config(remote.fetch_text(repository, commit, path))
    weights = commit.files.get(str(PurePosixPath(folder) / WEIGHTS))
    return Held(folder, config, weights.size if weights else 0, scores.get(folder, {}))


def _scores(manifest: Manifest | None, info: ModelInfo) -> dict[str, dict[str, float]]:
    """Scores by folder; a card alone tells those of the adapter at the root."""
    if manifest is not None:
        return {task.folder or ".": task.named_scores for task in manifest.tasks}
    results: list[Any] = list(info.card_data.eval_results or ()) if info.card_data else []
    named = {f"{r.dataset_name}: {r.metric_name or r.metric_type}": r.metric_value for r in results}
    return {".": {name: float(value) for name, value in named.items() if isinstance(value, int | float)}}


def _found(info: ModelInfo) -> Found:
    tags = info.tags or []

    def after(start: str) -> str:
        return next((tag.removeprefix(start) for tag in tags if tag.startswith(start)), "")

    updated = info.last_modified.date().isoformat() if info.last_modified else ""
    return Found(info.id, after(_BASE), after(_METHOD), info.downloads or 0, updated)
