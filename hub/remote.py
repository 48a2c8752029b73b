"""A hub as loramux sees it: huggingface.co or any server that speaks its protocol, through `huggingface_hub`."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of whichever HTTP library this version of the client stands on
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from ..support.errors import ConfigError, RemoteError

LARGEST_TEXT = 64 << 20
"""Bytes: no card, figures or config is larger."""
_MEANWHILE = (409, 412)  # it is there already; it is not at the commit that was named


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit; `sha256` for a large file, for any other `blob_id`, which is Git's hash of it."""

    size: int
    blob_id: str
    sha256: str | None

    def is_same(self, content: Path | bytes) -> bool:
        """Whether it holds exactly these bytes."""
        if self.size != size_of(content):
            return False
        if self.sha256 is not None:
            return self.sha256 == sha256_of(content)
        data = content.read_bytes() if isinstance(content, Path) else content
        return self.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A repository at one commit."""

    info: ModelInfo
    sha: str
    files: dict[str, RemoteFile]


class Remote:
    """One hub.

    Args:
        endpoint: its address; None takes HF_ENDPOINT, or huggingface.co.
        token: None takes the one that the client knows (HF_TOKEN, `hf auth login`), False none.
    """

    def __init__(self, endpoint: str | None = None, token: str | Literal[False] | None = None) -> None:
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.api = HfApi(endpoint=self.endpoint, token=token, library_name="loramux", library_version=__version__)

    def commit(self, repository: str, revision: str | None = None) -> Commit:
        """What a repository holds at a branch, a tag or a commit.

        Raises:
            RemoteError: there is no such repository or revision, the hub cannot be reached, or a file's name leads out
                of the folder.
        """
        with self.talking(repository, revision):
            info = self.api.model_info(repository, revision=revision)
            assert info.sha is not None
            entries = self.api.list_repo_tree(repository, revision=info.sha, recursive=True)
            files = {
                entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
                for entry in entries
                if isinstance(entry, RepoFile)
            }
        for path in files:
            if not _stays_inside(path):
                raise RemoteError(f"{repository}: names a file {path!r}, which would lie outside of its folder")
        return Commit(info, info.sha, files)

    def exists(self, repository: str) -> bool:
        with self.talking(repository):
            return self.api.repo_exists(repository)

    def has_revision(self, repository: str, revision: str) -> bool:
        with self.talking(repository):
            return self.api.revision_exists(repository, revision)

    def read(self, repository: str, commit: Commit, path: str) -> str | None:
        """A text file of a commit; None where it has none of that name.

        Raises:
            RemoteError: it is too large for one, or cannot be fetched.
        """
        if path not in commit.files:
            return None
        return self.fetch_text(repository, commit, path).read_text(encoding="utf-8", errors="replace")

    def fetch_text(self, repository: str, commit: Commit, path: str) -> Path:
        """A text file of a commit, in the cache.

        Raises:
            RemoteError: it is too large for one, or cannot be fetched.
        """
        if (size := commit.files[path].size) > LARGEST_TEXT:
            raise RemoteError(f"{repository}/{path}: {size} bytes; {LARGEST_TEXT} are the most that is read of a text")
        return self.fetch(repository, commit, path)

    def fetch(self, repository: str, commit: Commit, path: str) -> Path:
        """A file of a commit, in the cache."""
        with self.talking(repository):
            return Path(self.api.hf_hub_download(repository, path, revision=commit.sha))

    @contextmanager
    def talking(self, repository: str = "", revision: str | None = None) -> Iterator[None]:
        """Say what went wrong between us and the hub in its own words.

        Raises:
            RemoteError: whatever the client raises.
        """
        named = f"{repository}@{revision}" if revision else repository or "the list of repositories"
        try:
            yield
        except RevisionNotFoundError:
            raise RemoteError(f"{named}: {self.endpoint} has that repository, but not that revision") from None
        except RepositoryNotFoundError:
            raise RemoteError(
                f"{named}: {self.endpoint} has no such repository, or it is private and you are not logged in "
                "(`hf auth login`, or the environment variable HF_TOKEN)"
            ) from None
        except EntryNotFoundError as error:
            raise RemoteError(f"{named}: {first_line(error)}") from None
        except HfHubHTTPError as error:
            if error.response.status_code in _MEANWHILE:
                raise RemoteError(
                    f"{named}: somebody else changed it meanwhile, so nothing was; do the same again (what was sent "
                    "already is not sent twice)"
                ) from None
            raise RemoteError(f"{named}: {self.endpoint} says: {first_line(error)}") from None
        except OfflineModeIsEnabled:
            raise RemoteError(f"{named}: HF_HUB_OFFLINE is set, so no hub is asked; unset it") from None
        except (HTTPError, ConnectionError, TimeoutError) as error:
            raise RemoteError(f"{self.endpoint} cannot be reached ({first_line(error)}); is it running?") from None
        except RuntimeError as error:  # what the library that sends large files raises
            raise RemoteError(f"{named}: {self.endpoint} did not take it ({first_line(error)}); try again") from None


def check_name(repository: str) -> str:
    """The name itself.

    Raises:
        ConfigError: it is not of the form `owner/name`, or holds what a hub does not take.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository!r}: {first_line(error)}") from None
    if repository.count("/") != 1:
        raise ConfigError(f"{repository!r}: write it as owner/name")
    return repository


def split_revision(name: str) -> tuple[str, str | None]:
    """`owner/name@revision` as the two, the second None where there is none; a folder's name stays whole."""
    if Path(name).is_dir():
        return name, None
    before, _, revision = name.partition("@")
    return before, revision or None


def _stays_inside(path: str) -> bool:
    return ".." not in PurePosixPath(path).parts and not path.startswith("/") and "\\" not in path and ":" not in path


def size_of(content: Path | bytes) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def sha256_of(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """How an error's message begins, or else what kind of error it is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
