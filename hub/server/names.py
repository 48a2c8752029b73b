"""Which names repos, files and references may have."""

import re
from dataclasses import dataclass
from pathlib import PureWindowsPath

from .errors import HubError

REPO_TYPES = ("models", "datasets", "spaces")
MAIN = "refs/heads/main"
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REFERENCE = re.compile(r"refs/(?:heads|tags)/[A-Za-z0-9][A-Za-z0-9._/+-]{0,200}")
# Words that the hub's own addresses start with, beside all that have a `_` first.
_RESERVED = {"api", *REPO_TYPES}
_COMMIT_ID = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RepoId:
    """A repo: `models`, `datasets` or `spaces`, and its two names."""

    type: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def page(self) -> str:
        """The path of its page, and the start of its files' paths."""
        return f"/{self}" if self.type == "models" else f"/{self.type}/{self}"


def repo_id(type_: str, text: str) -> RepoId:
    """Read `namespace/name`.

    Raises:
        HubError: 400, a name that clients of the Hub would not ask for either, or a namespace that the hub's own
            addresses need.
    """
    namespace, _, name = text.partition("/")
    if type_ not in REPO_TYPES:
        raise HubError(400, f"Invalid repo type {type_!r}: a hub has {', '.join(REPO_TYPES)}.")
    check_namespace(namespace)
    if not _is_name(name):
        raise HubError(
            400,
            f"Invalid repo name {name!r}: use letters, digits, '-', '_' and '.', at most 96, "
            "no '--' or '..', no '.git' at the end, no '-' or '.' first or last.",
        )
    return RepoId(type_, namespace, name)


def check_namespace(name: str) -> str:
    if not _is_name(name) or name.startswith("_") or name.lower() in _RESERVED:
        raise HubError(
            400,
            f"Invalid namespace {name!r}: use letters, digits, '-', '_' and '.', no '--' or '..', no '_' first, "
            f"and none of {', '.join(sorted(_RESERVED))}.",
        )
    return name


def _is_name(text: str) -> bool:
    return bool(_PART.fullmatch(text)) and "--" not in text and ".." not in text and not text.endswith(".git")


def check_path(path: str) -> str:
    """A file's path inside a repo, which must mean the same file on every system that downloads it."""
    parts = path.split("/")
    wrong = any(part in ("", ".", "..") or part.lower() == ".git" or len(part) > 255 for part in parts)
    if wrong or len(path) > 1024 or "\\" in path or not path.isprintable() or PureWindowsPath(path).drive:
        raise HubError(
            400,
            f"Invalid path {path[:200]!r}: use a relative path with '/' between its parts, "
            "no '..', no '.git', no drive, no backslash, nothing unprintable.",
        )
    return path


def check_reference(reference: str) -> str:
    """The full name of a branch or a tag, `refs/heads/...` or `refs/tags/...`."""
    name = reference.split("/", 2)[-1]
    parts = name.split("/")
    wrong = any(part in ("", ".", "..") or part.endswith((".", ".lock")) or ".." in part for part in parts)
    if wrong or not _REFERENCE.fullmatch(reference) or _COMMIT_ID.fullmatch(name):
        raise HubError(400, f"Invalid branch or tag {name[:200]!r}: use letters, digits, '-', '_', '.', '+' and '/'.")
    return reference
