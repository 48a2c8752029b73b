"""What the hub answers when it refuses."""

import errno
import sqlite3

from ...support.errors import LoramuxError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SQLITE_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE}


class HubError(LoramuxError):
    """A refusal: the HTTP status, a sentence for people, and the code by which clients know some of them."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


def repo_not_found(repo: object) -> HubError:
    """The answer for a repo that is not there, and for one that the caller may not see: nobody can tell which."""
    return HubError(404, f"Repository not found: {repo}", "RepoNotFound")


def is_disk_full(error: BaseException) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return getattr(error, "sqlite_errorcode", None) in _SQLITE_FULL
    return isinstance(error, OSError) and error.errno in _FULL


def disk_full(status: int = 507) -> HubError:
    return HubError(status, "The hub's disk is full: nothing of this request was kept. Free some space and try again.")
