"""The files of one commit: what a tree says of them, how it changes, and those that were read last."""

import hashlib
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .errors import HubError

ADAPTER_CONFIG = "adapter_config.json"
_COUNTED = (ADAPTER_CONFIG, "config.json")


@dataclass(frozen=True)
class Entry:
    """One file of a tree: the hash and size of its content, and git's name for it."""

    sha256: str
    size: int
    oid: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        """What clients name the file by in their caches."""
        return self.sha256 if self.is_lfs else self.oid

    def lfs(self, hash_name: str) -> dict[str, Any]:
        """What is told of a large file beside the rest, its hash under this name; nothing for a small one."""
        if not self.is_lfs:
            return {}
        pointer = len(lfs_pointer(self.sha256, self.size))
        return {"lfs": {hash_name: self.sha256, "size": self.size, "pointerSize": pointer}}


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git keeps in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Tree(dict[str, Entry]):
    """Files by their paths, in the order of these. It is shared by all who read it, so nobody changes it."""

    @cached_property
    def folders(self) -> dict[str, None]:
        """All folders, in order."""
        return dict.fromkeys(sorted({folder for path in self for folder in folders_of(path)}))

    @cached_property
    def counted(self) -> frozenset[str]:
        """Files whose fetch is the fetch of the repo: the configs that every library asks for, or what stands for them
        in a repo without one."""
        for name in _COUNTED:
            if found := frozenset(path for path in self if path.rsplit("/", 1)[-1] == name):
                return found
        return frozenset([max(self, key=lambda path: self[path].size)] if self else [])


class Draft:
    """A tree that is being changed."""

    def __init__(self, tree: Tree) -> None:
        self._files: dict[str, Entry] = {}
        self._inside: dict[str, set[str]] = defaultdict(set)
        for path, entry in tree.items():
            self.put(path, entry)

    def put(self, path: str, entry: Entry) -> None:
        self._files[path] = entry
        for folder in folders_of(path):
            self._inside[folder].add(path)

    def delete(self, path: str) -> None:
        """Raises:
        HubError: 404, there is no such file.
        """
        if self._files.pop(path, None) is None:
            raise HubError(404, f"There is no file {path!r} to delete.", "EntryNotFound")
        for folder in folders_of(path):
            self._inside[folder].remove(path)
            if not self._inside[folder]:
                del self._inside[folder]

    def delete_folder(self, path: str) -> None:
        """Raises:
        HubError: 404, there is no such folder.
        """
        if path not in self._inside:
            raise HubError(404, f"There is no folder {path!r} to delete.", "EntryNotFound")
        for inside in [*self._inside[path]]:
            self.delete(inside)

    def finish(self) -> Tree:
        """The tree as it is now.

        Raises:
            HubError: 400, a path would be a file and a folder.
        """
        if both := sorted(self._inside.keys() & self._files.keys()):
            raise HubError(400, f"{both[0]!r} would be a file and a folder: delete one of them first.")
        return Tree(sorted(self._files.items()))


class RecentTrees:
    """Reads trees by their digests, and keeps those that were asked for last: up to so many files in all of them."""

    def __init__(self, load: Callable[[str], Tree], max_files: int) -> None:
        self._load, self._max_files = load, max_files
        self._kept: OrderedDict[str, Tree] = OrderedDict()
        self._lock = threading.Lock()
        self.files = 0

    def read(self, digest: str) -> Tree:
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
                return self._kept[digest]
        tree = self._load(digest)
        with self._lock:
            if digest not in self._kept:
                self._kept[digest] = tree
                self.files += _weight(tree)
            while self.files > self._max_files:
                self.files -= _weight(self._kept.popitem(last=False)[1])
        return tree


def _weight(tree: Tree) -> int:
    return len(tree) + 1  # one for itself: there may be many without files


def folders_of(path: str) -> Iterator[str]:
    """Every folder a path lies in, the outermost first."""
    at = path.find("/")
    while at != -1:
        yield path[:at]
        at = path.find("/", at + 1)
