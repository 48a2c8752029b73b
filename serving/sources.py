"""Where adapters may come from: folders below the allowed roots, and repositories of the Hugging Face Hub."""

import re
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from ..adapters.lora_folder import CONFIG, WEIGHTS
from ..hub.remote import Remote, RemoteFile
from ..support.errors import RemoteError
from .errors import ServingError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"\w[\w./-]{0,199}")
_FILES = (CONFIG, WEIGHTS)
_SHOWN = 120
_MOST_DOWNLOADS = 4


@dataclass(frozen=True)
class Found:
    """An adapter's folder.

    Attributes:
        folder: without links.
        root: its files must lie below this folder, links followed.
        origin: how it was asked for: a path, or a repository of the Hub.
        revision: the commit of a repository.
    """

    folder: Path
    root: Path
    origin: str
    revision: str | None = None

    @property
    def is_there(self) -> bool:
        return all((self.folder / file).is_file() for file in _FILES)

    def check(self) -> None:
        """Look anew whether links lead out, since folders change while a server runs.

        Raises:
            ServingError: `adapter_path_forbidden`.
        """
        for file in _FILES:
            if not (self.folder / file).resolve().is_relative_to(self.root):
                raise ServingError(
                    "adapter_path_forbidden", f"{self.origin}: its {file} is a link out of its root", 403
                )


class Sources:
    """Finds adapters.

    Args:
        roots: the only folders below which folders are opened.
        hub: the Hub to ask, if any may be.
        most_bytes: of a weights file, which is not downloaded if it is larger.
        download_s: seconds a download may take.
    """

    def __init__(self, roots: Iterable[Path], *, hub: Remote | None, most_bytes: int, download_s: float) -> None:
        self._roots = tuple(dict.fromkeys(root.expanduser().resolve() for root in roots))
        self._hub, self._most_bytes, self._download_s = hub, most_bytes, download_s
        self._downloads = threading.BoundedSemaphore(_MOST_DOWNLOADS)

    def find(self, source: str, revision: str | None = None) -> Found:
        """The folder of an adapter.

        Args:
            source: a path, absolute or relative to a root; or `owner/name` on the Hub, also `owner/name@revision`.
            revision: a branch, tag or commit of the Hub; what it stands for now is kept.

        Raises:
            ServingError: `adapter_path_forbidden`, `adapter_not_found`, `hub_disabled`, `adapter_not_fetched`,
                `adapter_load_busy`, `adapter_load_timeout`, `adapter_invalid`, `adapter_too_large`.
        """
        found = self._folder(source)
        if found is not None:
            if revision is not None:
                raise ServingError("adapter_not_found", f"{shortened(source)}: a folder, which has no revisions", 404)
            return found
        repository, _, given = source.partition("@")
        revision = revision or given or None
        if not _REPOSITORY.fullmatch(repository) or not _REVISION.fullmatch(revision or "main"):
            raise ServingError(
                "adapter_not_found",
                f"{shortened(source)}: no such folder below the roots, and no owner/name or owner/name@revision",
                404,
            )
        if self._hub is None:
            raise ServingError(
                "hub_disabled",
                f"{source}: no such folder, and this server does not ask the Hub (hub: true lets it)",
                403,
            )
        return self._download(self._hub, repository, revision)

    def _folder(self, source: str) -> Found | None:
        """A folder below a root; None where there is none of this name and it may be one on the Hub."""
        is_path = source.startswith(("/", ".", "~"))
        try:
            paths = [Path(source)] if source.startswith("/") else [root / source for root in self._roots]
            places = [path.resolve() for path in paths]
            allowed = [(place, root) for place in places for root in self._roots if place.is_relative_to(root)]
            for place, root in allowed:
                if source and place.is_dir():
                    return Found(place, root, source)
        except (ValueError, OSError, RuntimeError) as error:  # a NUL, a name too long, a circle of links
            reason = getattr(error, "strerror", None) or shortened(str(error))
            raise ServingError("adapter_not_found", f"{shortened(source)}: not a path ({reason})", 404) from None
        if is_path and not allowed:
            roots = ", ".join(map(str, self._roots)) or "none"
            raise ServingError(
                "adapter_path_forbidden", f"{shortened(source)}: not below a folder that may be read ({roots})", 403
            )
        if is_path:
            raise ServingError("adapter_not_found", f"{shortened(source)}: no such folder", 404)
        return None

    def _download(self, hub: Remote, repository: str, revision: str | None) -> Found:
        """Wait for a download no longer than allowed; one that hangs ends by the library's own limits."""
        if not self._downloads.acquire(blocking=False):
            raise ServingError("adapter_load_busy", f"{_MOST_DOWNLOADS} adapters are being downloaded; try again", 429)
        future: Future[Found] = Future()

        def work() -> None:
            try:
                future.set_result(self._fetch(hub, repository, revision))
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._downloads.release()

        threading.Thread(target=work, name="adapter-download", daemon=True).start()
        try:
            return future.result(self._download_s)
        except TimeoutError:
            raise ServingError(
                "adapter_load_timeout", f"{repository}: not downloaded within {self._download_s:g} s", 504
            ) from None

    def _fetch(self, hub: Remote, repository: str, revision: str | None) -> Found:
        try:
            commit = hub.commit(repository, revision)
            self._check_files(repository, commit.files)
            config = hub.fetch_text(repository, commit, CONFIG)
            hub.fetch(repository, commit, WEIGHTS)
        except RemoteError as error:
            raise ServingError("adapter_not_fetched", str(error), 502) from None
        folder = config.parent
        return Found(folder, folder.parent.parent.resolve(), repository, commit.sha)  # files there are links to blobs

    def _check_files(self, repository: str, files: dict[str, RemoteFile]) -> None:
        for file in _FILES:
            if file not in files:
                raise ServingError("adapter_invalid", f"{repository}: has no {file}, so it is no adapter to serve")
        if files[WEIGHTS].size > self._most_bytes:
            raise ServingError(
                "adapter_too_large", f"{repository}: {files[WEIGHTS].size} bytes; at most {self._most_bytes}", 413
            )


def shortened(text: str) -> str:
    """A stranger's words, printable and at a length that fits a message."""
    plain = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return plain if len(plain) <= _SHOWN else f"{plain[:_SHOWN]}..."
