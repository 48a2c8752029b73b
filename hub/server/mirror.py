"""Copies one hub to another by what every hub offers: the history of all repos, commit by commit.

What a copy has got to is written into its own commits, so a mirror that is interrupted goes on where it was, and one
that runs again brings what is new.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from ...support.console import say
from ...support.errors import RunError

_TYPES = ("model", "dataset")
_TRAILER = re.compile(r"^Mirrored-From: ([0-9a-f]{40})$", re.MULTILINE)


@dataclass
class Mirrored:
    """What a mirror did: repos looked at, commits made, and the repos that could not be copied, each with why."""

    repos: int = 0
    commits: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def mirror(source: HfApi, target: HfApi, *, author: str | None = None, only: str | None = None) -> Mirrored:
    """Copy models and datasets with their branches, tags and messages; private ones stay private.

    Args:
        author: only the repos of this user or organisation.
        only: only this repo, `namespace/name`.

    Raises:
        RunError: the source cannot be listed.
    """
    done = Mirrored()
    for type_, repo in _repos(source, author):
        if only not in (None, repo.id):
            continue
        done.repos += 1
        try:
            done.commits += _Copy(source, target, type_, repo.id).run(private=bool(repo.private))
        except (HfHubHTTPError, OSError, ValueError) as error:
            done.failed[repo.id] = str(error).strip().splitlines()[0]
            say(f"{type_} {repo.id}: {done.failed[repo.id]}")
    if only is not None and not done.repos:
        raise RunError(f"{source.endpoint}: no repo {only!r} that this token may see")
    return done


def _repos(source: HfApi, author: str | None) -> Iterator[tuple[str, Any]]:
    try:
        for type_ in _TYPES:
            listed = source.list_models(author=author) if type_ == "model" else source.list_datasets(author=author)
            yield from ((type_, repo) for repo in listed)
    except HfHubHTTPError as error:
        raise RunError(f"{source.endpoint}: its repos cannot be listed: {error}") from None


class _Copy:
    """One repo on its way. `copied` leads from commits of the source to those of the target."""

    def __init__(self, source: HfApi, target: HfApi, type_: str, repo: str) -> None:
        self._source, self._target = source, target
        self._repo: dict[str, Any] = {"repo_id": repo, "repo_type": type_}
        self._copied: dict[str, str] = {}
        self._made = 0

    def run(self, *, private: bool) -> int:
        """Bring the copy up to date; returns how many commits that took."""
        self._target.create_repo(**self._repo, private=private, exist_ok=True)
        refs = self._source.list_repo_refs(**self._repo)
        there = self._target.list_repo_refs(**self._repo)
        self._recall([branch.name for branch in there.branches])
        self._pair_empty_roots()
        # Other branches and all tags start at commits of main more often than not.
        for branch in sorted(refs.branches, key=lambda branch: (branch.name != "main", branch.name)):
            self._copy_branch(branch.name, is_new=branch.name not in {other.name for other in there.branches})
        tags = {tag.name for tag in there.tags}
        for tag in refs.tags:
            if tag.name not in tags and tag.target_commit in self._copied:
                self._target.create_tag(**self._repo, tag=tag.name, revision=self._copied[tag.target_commit])
        return self._made

    def _recall(self, branches: list[str]) -> None:
        for branch in branches:
            for commit in self._target.list_repo_commits(**self._repo, revision=branch):
                if mirrored := _TRAILER.search(commit.message):
                    self._copied.setdefault(mirrored[1], commit.commit_id)

    def _pair_empty_roots(self) -> None:
        """The empty commit that every repo starts with is nobody's copy, but branches may start there."""
        root, own = (hub.list_repo_commits(**self._repo)[-1].commit_id for hub in (self._source, self._target))
        if not self._files(self._source, root):
            self._copied.setdefault(root, own)

    def _copy_branch(self, branch: str, *, is_new: bool) -> None:
        commits = self._source.list_repo_commits(**self._repo, revision=branch)[::-1]
        known = [index for index, commit in enumerate(commits) if commit.commit_id in self._copied]
        first = known[-1] + 1 if known else 0
        if is_new:
            start = self._copied[commits[first - 1].commit_id] if known else "main"
            self._target.create_branch(**self._repo, branch=branch, revision=start)
        for index in range(first, len(commits)):
            before = commits[index - 1].commit_id if index else None
            self._copy_commit(branch, before, commits[index])

    def _copy_commit(self, branch: str, before: str | None, commit: Any) -> None:
        old = self._files(self._source, before) if before else {}
        new = self._files(self._source, commit.commit_id)
        changed = [path for path, blob in new.items() if old.get(path) != blob]
        with TemporaryDirectory() as folder:
            operations: list[Any] = [CommitOperationDelete(path) for path in old if path not in new]
            operations += [CommitOperationAdd(path, self._fetch(path, commit.commit_id, folder)) for path in changed]
            if not operations:  # a commit may change nothing, and clients do not make such
                self._copied[commit.commit_id] = str(self._target.repo_info(**self._repo, revision=branch).sha)
                return
            made = self._target.create_commit(
                **self._repo,
                operations=operations,
                commit_message=commit.title or "commit",
                commit_description=f"{commit.message}\n\nMirrored-From: {commit.commit_id}".strip(),
                revision=branch,
            )
        self._copied[commit.commit_id] = made.oid
        self._made += 1

    def _files(self, hub: HfApi, revision: str) -> dict[str, str]:
        """The hash of each file."""
        listed = hub.list_repo_tree(**self._repo, revision=revision, recursive=True)
        return {
            file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in listed if isinstance(file, RepoFile)
        }

    def _fetch(self, path: str, revision: str, folder: str) -> Path:
        local = Path(folder) / revision
        return Path(self._source.hf_hub_download(**self._repo, filename=path, revision=revision, local_dir=local))
