"""Files by the hash of their content: what has its name is whole, on the disk, and never changes."""

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO
from weakref import WeakValueDictionary

from .errors import HubError

_BUFFER = 1 << 20  # bytes


class Files:
    """Content-addressed files in `root/files`; what is still being received is in `root/incoming`."""

    def __init__(self, root: Path) -> None:
        self._kept, self._incoming = root / "files", root / "incoming"
        self._partials: WeakValueDictionary[str, Partial] = WeakValueDictionary()
        self._lock = threading.Lock()
        for folder in (self._incoming, *(self._kept / f"{first:02x}" for first in range(256))):
            folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self._kept)

    def path(self, sha256: str) -> Path:
        return self._kept / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        """Bytes of the file, None where there is none."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def receive(self) -> "Incoming":
        return Incoming(self, self._incoming)

    def open_partial(self, name: str) -> "Partial":
        """The file that arrives in parts under this name: one and the same for all who have it open."""
        with self._lock:
            return self._partials.setdefault(name, Partial(self, self._incoming / f"{name}.parts"))

    def keep(self, received: Path, sha256: str) -> None:
        """Give a received file, which is on the disk already, its name."""
        target = self.path(sha256)
        os.replace(received, target)
        sync_folder(target.parent)

    def remove(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)

    def all_older_than(self, seconds: float) -> list[str]:
        """The hashes of files that nobody has touched for so long."""
        return [path.name for path in self._kept.glob("??/*") if self.is_older_than(seconds, path.name)]

    def is_older_than(self, seconds: float, sha256: str) -> bool:
        """Whether it is here, and nobody has touched it for so long."""
        try:
            return self.path(sha256).stat().st_mtime < time.time() - seconds
        except FileNotFoundError:
            return False

    def touch(self, sha256: str) -> None:
        os.utime(self.path(sha256))

    def sweep(self, seconds: float = 0.0) -> None:
        """Remove what was being received when it was given up, that long ago or longer."""
        before = time.time() - seconds
        for path in self._incoming.iterdir():
            if path.stat().st_mtime <= before:
                path.unlink(missing_ok=True)


class Incoming:
    """A file that is being received: hashed as it grows, and gone after the block unless it was kept."""

    def __init__(self, files: Files, folder: Path) -> None:
        self._files = files
        handle, name = tempfile.mkstemp(dir=folder)
        self._file, self._path = os.fdopen(handle, "wb", _BUFFER), Path(name)
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        self._file.write(data)
        self.size += len(data)

    def write_all(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self.write(piece)

    def reopen(self) -> BinaryIO:
        """What was written so far, for reading."""
        self._file.flush()
        return self._path.open("rb")

    def move(self, target: Path) -> None:
        """Give it a name that need not survive a crash."""
        self._file.flush()
        os.replace(self._path, target)

    def keep(self, *, sha256: str | None, size: int | None = None) -> str:
        """File it under its hash.

        Args:
            sha256, size: what it was announced to be, where it was.

        Returns:
            the hash.

        Raises:
            HubError: 400, when it is something else than was announced.
        """
        if sha256 not in (None, self.sha256) or size not in (None, self.size):
            raise wrong_content(sha256, size, self.sha256, self.size)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._files.keep(self._path, self.sha256)
        return self.sha256

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._path.unlink(missing_ok=True)
        try:
            self._file.close()
        except OSError:  # what the full disk did not take is not wanted any more
            if kind is None:
                raise


class Partial:
    """A file that arrives in parts, each at its own place, until it is closed."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files, self._path = files, path
        self._lock, self._is_closed = threading.Lock(), False

    @contextmanager
    def writer_at(self, start: int) -> Iterator["PartWriter"]:
        """Something to write one part with, from the byte `start` on."""
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            yield PartWriter(self, handle, start)
        finally:
            os.close(handle)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises:
        HubError: 409, the file is closed.
        """
        self._refuse_if_closed()  # at once, rather than after all was hashed
        with self._lock:
            self._refuse_if_closed()
            yield

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise HubError(409, "This upload is complete already: it takes no more parts.")

    @contextmanager
    def closed(self) -> Iterator[None]:
        """From now on no part changes the file, whoever has it open; one caller at a time."""
        with self._lock:
            self._is_closed = True
            yield

    def keep(self, sha256: str, size: int) -> None:
        """Check the whole, which must be closed, and file it under its hash; what is wrong is removed, so that all of
        it is sent again."""
        try:
            with self._path.open("rb") as file:
                found, length = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
                os.fsync(file.fileno())
        except FileNotFoundError:
            raise HubError(400, "No part of this file was uploaded.") from None
        if (found, length) != (sha256, size):
            self._path.unlink()
            raise wrong_content(sha256, size, found, length)
        self._files.keep(self._path, sha256)

    def discard(self) -> None:
        self._path.unlink(missing_ok=True)


class PartWriter:
    """Writes one part, and counts its bytes in `size`."""

    def __init__(self, partial: Partial, handle: int, start: int) -> None:
        self._partial, self._handle, self._start, self.size = partial, handle, start, 0

    def write_all(self, pieces: list[bytes]) -> None:
        with self._partial.writing():
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    written = os.pwrite(self._handle, view, self._start + self.size)
                    view, self.size = view[written:], self.size + written


def wrong_content(sha256: str | None, size: int | None, found: str, length: int) -> HubError:
    announced = " ".join(
        f"{part}" for part in (sha256 and f"sha256 {sha256}", size is not None and f"{size} bytes") if part
    )
    return HubError(400, f"Content does not match: announced {announced}, received sha256 {found}, {length} bytes.")


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
