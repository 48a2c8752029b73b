"""Copies one hub to another by what every hub offers: the history of all repos, commit by commit.

What a copy has got to is written into its own commits, so a mirror that is interrupted goes on where it was, and one
that runs again brings what is new.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import GitCommitInfo, GitRefs, RepoFile

from ..support.console import say
from ..support.errors import RemoteError, RunError
from .remote import Remote, first_line

_T = TypeVar("_T")
_TYPES = ("model", "dataset")
_TRAILER = re.compile(r"^Mirrored-From: ([0-9a-f]{40})$", re.MULTILINE)
_OF_THE_HUB = ".gitattributes"  # hubs write it themselves, each its own


@dataclass
class Mirrored:
    """What a mirror did: repos looked at, commits made, and the repos that could not be copied, each with why."""

    repos: int = 0
    commits: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def mirror(source: Remote, target: Remote, *, author: str | None = None, only: str | None = None) -> Mirrored:
    """Copy models and datasets with their branches, tags and messages.

    A copy of a private repo is private, also where the repo became so later; none is made public again.

    Args:
        author: only the repos of this user or organisation.
        only: only this repo, `namespace/name`.

    Raises:
        RemoteError: the source cannot be listed.
        RunError: it has no such repo.
    """
    done = Mirrored()
    for type_, repo in _repos(source, author):
        if only not in (None, repo.id):
            continue
        done.repos += 1
        copy = _Copy(_Repo(source, repo.id, type_), _Repo(target, repo.id, type_))
        try:
            copy.run(private=bool(repo.private))
        except (RemoteError, RunError, OSError, ValueError) as error:
            done.failed[repo.id] = first_line(error)
            say(f"{type_} {repo.id}: {done.failed[repo.id]}")
        done.commits += copy.made
    if only is not None and not done.repos:
        raise RunError(f"{source.endpoint}: no repo {only!r} that this token may see")
    return done


def _repos(source: Remote, author: str | None) -> Iterator[tuple[str, Any]]:
    with source.talking():
        for type_ in _TYPES:
            listed = source.api.list_models if type_ == "model" else source.api.list_datasets
            yield from ((type_, repo) for repo in listed(author=author))


@dataclass(frozen=True)
class _Repo:
    """A repo on one of the two hubs. Each method raises RemoteError as `Remote.talking` does."""

    remote: Remote
    name: str
    type_: str

    def ask(self, method: Callable[..., _T], **arguments: Any) -> _T:
        """Call a method of the client for this repo."""
        with self.remote.talking(self.name):
            return method(self.remote.api, repo_id=self.name, repo_type=self.type_, **arguments)

    def make(self, *, private: bool) -> None:
        self.ask(HfApi.create_repo, private=private, exist_ok=True)
        if private and not self.ask(HfApi.repo_info).private:
            self.ask(HfApi.update_repo_settings, private=True)

    def commits(self, revision: str) -> list[GitCommitInfo]:
        """The newest first."""
        return self.ask(HfApi.list_repo_commits, revision=revision)

    def files(self, revision: str) -> dict[str, str]:
        """The hash of each file."""
        with self.remote.talking(self.name):
            listed = self.ask(HfApi.list_repo_tree, revision=revision, recursive=True)
            return {
                file.path: file.lfs.sha256 if file.lfs else file.blob_id
                for file in listed
                if isinstance(file, RepoFile)
            }


class _Copy:
    """One repo on its way.

    Attributes:
        made: commits so far.

    `_copied` leads from commits of the source to those of the target, `_origin` back.
    """

    def __init__(self, source: _Repo, target: _Repo) -> None:
        self._source, self._target = source, target
        self._copied: dict[str, str] = {}
        self._origin: dict[str, str] = {}
        self.made = 0

    def run(self, *, private: bool) -> None:
        """Bring the copy up to date.

        Raises:
            RemoteError: one of the hubs cannot be reached, or refuses.
            RunError: everything was copied but tags that are on no commit of a branch.
        """
        self._target.make(private=private)
        refs, there = (repo.ask(HfApi.list_repo_refs) for repo in (self._source, self._target))
        self._pair_empty_roots()
        reached = {branch.name: self._recall(branch.name) for branch in there.branches}
        # Other branches and all tags start at commits of main more often than not.
        for name in sorted((branch.name for branch in refs.branches), key=lambda name: (name != "main", name)):
            line = self._source.commits(name)[::-1]
            self._copy_branch(name, line, reached[name] if name in reached else self._start_branch(name, line))
        self._copy_tags(refs, there)

    def _pair_empty_roots(self) -> None:
        """The empty commit that every repo starts with is nobody's copy, but branches may start there."""
        root, own = (repo.commits("main")[-1].commit_id for repo in (self._source, self._target))
        if not self._source.files(root):
            self._note(root, own)

    def _recall(self, branch: str) -> str | None:
        """Note what a branch of the target has copies of; returns of which commit it has the newest."""
        commits = self._target.commits(branch)
        for commit in commits:
            if named := _TRAILER.findall(commit.message):
                self._note(named[-1], commit.commit_id)  # the others are of mirrors that the source comes from
        return next((self._origin[commit.commit_id] for commit in commits if commit.commit_id in self._origin), None)

    def _note(self, original: str, copy: str) -> None:
        self._copied.setdefault(original, copy)
        self._origin[copy] = original

    def _start_branch(self, branch: str, line: list[GitCommitInfo]) -> str | None:
        """Make a branch of the target at the newest commit that it has a copy of; returns that commit."""
        known = [commit.commit_id for commit in line if commit.commit_id in self._copied]
        self._target.ask(HfApi.create_branch, branch=branch, revision=self._copied[known[-1]] if known else "main")
        return known[-1] if known else None

    def _copy_branch(self, branch: str, line: list[GitCommitInfo], reached: str | None) -> None:
        """Copy what follows the commit that was reached.

        Where that is not in the line any more (it was squashed, say), the branch is made what the next commit holds.
        """
        ids = [commit.commit_id for commit in line]
        new = (index for index, commit in enumerate(ids) if commit not in self._copied)
        first = ids.index(reached) + 1 if reached in ids else next(new, len(ids) - 1)
        if first == len(ids):
            return
        if reached in ids:
            held = self._source.files(str(reached))
        else:
            held = {path: blob for path, blob in self._target.files(branch).items() if path != _OF_THE_HUB}
        for commit in line[first:]:
            held = self._copy_commit(branch, held, commit)

    def _copy_commit(self, branch: str, before: dict[str, str], commit: GitCommitInfo) -> dict[str, str]:
        """Make a branch of the target that holds `before` hold what a commit holds; returns that."""
        new = self._source.files(commit.commit_id)
        changed = [path for path, blob in new.items() if before.get(path) != blob]
        with TemporaryDirectory() as folder:
            operations: list[Any] = [CommitOperationDelete(path) for path in before if path not in new]
            operations += [CommitOperationAdd(path, self._fetch(path, commit.commit_id, folder)) for path in changed]
            if not operations:  # a commit may change nothing, and clients do not make such
                self._note(commit.commit_id, str(self._target.ask(HfApi.repo_info, revision=branch).sha))
                return new
            made = self._target.ask(
                HfApi.create_commit,
                operations=operations,
                commit_message=commit.title or "commit",
                commit_description=f"{commit.message}\n\nMirrored-From: {commit.commit_id}".strip(),
                revision=branch,
            )
        self._note(commit.commit_id, made.oid)
        self.made += 1
        return new

    def _fetch(self, path: str, revision: str, folder: str) -> Path:
        local = Path(folder) / revision
        return Path(self._source.ask(HfApi.hf_hub_download, filename=path, revision=revision, local_dir=local))

    def _copy_tags(self, refs: GitRefs, there: GitRefs) -> None:
        tags = {tag.name for tag in there.tags}
        missing = [tag for tag in refs.tags if tag.name not in tags]
        for tag in missing:
            if tag.target_commit in self._copied:
                self._target.ask(HfApi.create_tag, tag=tag.name, revision=self._copied[tag.target_commit])
        if left := [tag.name for tag in missing if tag.target_commit not in self._copied]:
            raise RunError(f"copied but for its tags {', '.join(left)}: they are on commits that no branch reaches")
