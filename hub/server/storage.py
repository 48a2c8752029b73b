"""Everything a hub keeps, in one folder: `hub.sqlite`, `files/`, and what is being received."""

import fcntl
import secrets
import shutil
from pathlib import Path
from typing import IO

from ...support.errors import RunError
from .accounts import Accounts
from .database import Database
from .files import Files
from .history import History
from .repos import Repos


class Storage:
    """The folder of a hub, for any number of processes; only one of them may `serve` it.

    Raises:
        RunError: there is a file where the folder should be, or a hub of another version.
    """

    def __init__(self, root: Path) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except (FileExistsError, NotADirectoryError):
            raise RunError(f"{root}: a file lies there; a hub needs a folder of its own") from None
        self.root = root
        self._lock: IO[str] | None = None
        self.database = Database(root / "hub.sqlite")
        self.files = Files(root)
        self.accounts = Accounts(self.database)
        self.history = History(self.database, self.files)
        self.repos = Repos(self.database, self.history)

    def lock(self) -> None:
        """Become the one process that serves this folder, and sweep up what an earlier one left half received.

        Raises:
            RunError: another process serves it.
        """
        self._lock = (self.root / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"{self.root}: another `loramux hub serve` has this folder; stop it or take another"
            ) from None
        self.files.sweep()

    def secret(self) -> bytes:
        """The key that signs upload links, made once."""
        with self.database.write() as connection:
            connection.execute("INSERT OR IGNORE INTO settings VALUES ('secret', ?)", (secrets.token_hex(32),))
            row = connection.execute("SELECT value FROM settings WHERE name = 'secret'").fetchone()
        return bytes.fromhex(row["value"])

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    def close(self) -> None:
        self.database.close()
        if self._lock is not None:
            self._lock.close()
