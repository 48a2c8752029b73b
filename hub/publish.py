"""Publishing: what a run or a folder of exports holds goes to a hub, each repository in one commit or not at all."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.constants import DEFAULT_REVISION

from .. import __version__
from ..adapters.lora_folder import CONFIG, WEIGHTS
from ..support.config import config, to_data
from ..support.errors import ConfigError
from .card import CARD, write_card
from .leaks import Examples, Kind, find_leaks, refuse_leaks
from .manifest import MANIFEST, make_manifest, read_manifest
from .remote import Commit, Remote, check_name, sha256_of, size_of
from .signing import ATTESTATION, Key, attest
from .source import MIXTURE, REPORT, Source, read_source

State = Literal["new", "changed", "unchanged", "removed"]


@config
class PublishConfig:
    """How to publish.

    Attributes:
        split: a repository for each task beside the one of the mixture, instead of a folder.
        revision: the branch; made from `main` where it is not there yet.
        private: of a repository that is new; one that is there must be private already.
        licence: as the Hub names it.
        examples: of each task's test split on its card.
        allow: kinds of leaks that may be published.
    """

    split: bool = False
    revision: str = DEFAULT_REVISION
    private: bool = False
    licence: str | None = None
    examples: int = 3
    allow: tuple[Kind, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One file of a repository and what publishing does to it."""

    path: str
    state: State
    content: Path | bytes = b""

    @property
    def size(self) -> int:
        return size_of(self.content)


@dataclass(frozen=True)
class Change:
    """What publishing does to one repository.

    Attributes:
        parent: the commit it starts from; None for a repository that is not there yet.
        branch_exists: whether the branch is there.
    """

    repository: str
    revision: str
    parent: str | None
    branch_exists: bool
    entries: list[Entry]

    @property
    def sent(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.state in ("new", "changed")]

    @property
    def is_empty(self) -> bool:
        return self.branch_exists and all(entry.state == "unchanged" for entry in self.entries)


def plan_publication(
    place: Path, name: str, settings: PublishConfig, remote: Remote, *, key: Key | None = None
) -> list[Change]:
    """Work out what publishing would send, which changes nothing anywhere.

    Args:
        place: a run folder, a folder of exports, or one adapter.
        name: `owner/name`.
        key: signs what is published.

    Raises:
        RunError, ConfigError: there is nothing to publish, or not under that name.
        LeakFound: something in it looks private.
        RemoteError: the hub cannot be asked.
    """
    check_name(name)
    source = read_source(place, examples=settings.examples)
    changes = [
        _compare(repository, part, settings, remote, key) for repository, part in _parts(source, name, settings.split)
    ]
    private = () if "example" in settings.allow else source.private_texts()
    examples = Examples(private, _chosen(source))
    for change in changes:
        refuse_leaks(find_leaks({entry.path: entry.content for entry in change.sent}, examples), settings.allow)
    return changes


def publish(change: Change, remote: Remote, *, private: bool = False) -> str | None:
    """Make one repository what it was planned to be, in one commit; what was uploaded before is not sent again.

    Returns:
        The address of the commit; None where nothing had changed.

    Raises:
        RemoteError: the hub refuses, or somebody else has made or changed the repository since.
    """
    if change.is_empty:
        return None
    with remote.talking(change.repository):
        parent = change.parent
        if parent is None:
            remote.api.create_repo(change.repository, private=private)
            parent = remote.api.model_info(change.repository).sha
        if not change.branch_exists:
            remote.api.create_branch(change.repository, branch=change.revision, revision=parent)
        done = remote.api.create_commit(
            change.repository,
            _operations(change.entries),
            commit_message=f"Publish with loramux {__version__}",
            revision=change.revision,
            parent_commit=parent,
        )
    return done.commit_url


def _parts(source: Source, name: str, split: bool) -> list[tuple[str, Source]]:
    """The repositories and what goes into each."""
    if not split:
        return [(name, source)]
    parts = [(check_name(f"{name}-{adapter.task}"), source.only(adapter.task)) for adapter in source.adapters]
    return [*parts, (name, replace(source, adapters=()))] if source.mixture else parts


def _compare(repository: str, source: Source, settings: PublishConfig, remote: Remote, key: Key | None) -> Change:
    before, branch_exists = _before(repository, settings, remote)
    existing = manifest = None
    if before is not None:
        existing = remote.read(repository, before, CARD)
        manifest = read_manifest(remote.read(repository, before, MANIFEST), repository)
    wanted = _files(source, repository, key)
    wanted[CARD] = write_card(source, repository, licence=settings.licence, existing=existing).encode()
    there = before.files if before else {}
    entries = [Entry(path, _state(path, content, before), content) for path, content in sorted(wanted.items())]
    stale = [*manifest.files, ATTESTATION] if manifest else []
    entries += [Entry(path, "removed") for path in stale if path not in wanted and path in there]
    return Change(repository, settings.revision, before.sha if before else None, branch_exists, entries)


def _before(repository: str, settings: PublishConfig, remote: Remote) -> tuple[Commit | None, bool]:
    """What the branch is at, or where it will start from, and whether it is there."""
    if not remote.exists(repository):
        return None, settings.revision == DEFAULT_REVISION
    branch_exists = remote.has_revision(repository, settings.revision)
    commit = remote.commit(repository, settings.revision if branch_exists else None)
    if settings.private and not commit.info.private:
        raise ConfigError(
            f"{repository}: it is there already and public, which --private does not change; make it private on the "
            "hub first, or name another repository"
        )
    return commit, branch_exists


def _state(path: str, content: Path | bytes, before: Commit | None) -> State:
    if before is None or path not in before.files:
        return "new"
    return "unchanged" if before.files[path].is_same(content) else "changed"


def _files(source: Source, repository: str, key: Key | None) -> dict[str, Path | bytes]:
    """Everything but the card, by its path in the repository."""
    in_folders = len(source.adapters) > 1 or source.mixture is not None
    folders = [adapter.task if in_folders else "" for adapter in source.adapters]
    files: dict[str, Path | bytes] = {}
    for path, content in _contents(source, folders):
        if path in files:
            raise ConfigError(
                f"{source.place}: two different files would be {path} in {repository}; give each adapter a name of its "
                f"own (`task` in its {REPORT}), other than {MIXTURE!r} beside a mixture, or publish them one by one"
            )
        files[path] = content.encode() if isinstance(content, str) else content
    files[MANIFEST] = _json(to_data(make_manifest(source, folders, files)))
    if key is not None:
        hashes = {path: sha256_of(content) for path, content in files.items()}
        files[ATTESTATION] = _json(attest(hashes, repository, _origin(source), key))
    return files


def _contents(source: Source, folders: list[str]) -> Iterator[tuple[str, Path | str]]:
    yield from source.files.items()
    for adapter, folder in zip(source.adapters, folders, strict=True):
        yield from ((f"{folder}/{name}".lstrip("/"), content) for name, content in adapter.files.items())
    if source.mixture is not None:
        yield from ((f"{MIXTURE}/{name}", source.mixture / name) for name in (CONFIG, WEIGHTS))
    if source.recipe:
        yield "recipe.yaml", source.recipe


def _origin(source: Source) -> dict[str, Any]:
    """Which run it comes from, for the attestation."""
    noted = ("base_fingerprint", "tasks", "seed", "git_revision")
    run = {name: source.environment[name] for name in noted if name in source.environment}
    return {"base": source.base.name, "base_revision": source.base.revision, "method": source.method, "run": run}


def _chosen(source: Source) -> Iterable[str]:
    """What was chosen or written to be read: the examples on cards, and the tasks' descriptions."""
    for adapter in source.adapters:
        yield adapter.description
        for example in adapter.examples:  # an answer of one example may be the prompt of another
            yield from (example.prompt, example.wanted, example.answer or "")
    yield from (task.description for task in source.tasks)


def _operations(entries: Iterable[Entry]) -> list[CommitOperationAdd | CommitOperationDelete]:
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for entry in entries:
        if entry.state == "removed":
            operations.append(CommitOperationDelete(entry.path))
        elif entry.state != "unchanged":
            content = str(entry.content) if isinstance(entry.content, Path) else entry.content
            operations.append(CommitOperationAdd(entry.path, content))
    return operations


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
