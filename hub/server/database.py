"""The hub's SQLite file: many readers, one writer, and a commit is on the disk before anybody hears of it."""

import sqlite3
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...support.errors import RunError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);

CREATE TABLE IF NOT EXISTS accounts (
    name TEXT PRIMARY KEY COLLATE NOCASE,
    is_organization INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS members (
    organization TEXT NOT NULL COLLATE NOCASE,
    user TEXT NOT NULL COLLATE NOCASE,
    PRIMARY KEY (organization, user)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tokens (
    id TEXT PRIMARY KEY,
    user TEXT NOT NULL,
    role TEXT NOT NULL,
    note TEXT NOT NULL,
    digest BLOB NOT NULL,
    created TEXT NOT NULL,
    expires TEXT,
    revoked TEXT
);

CREATE TABLE IF NOT EXISTS repos (
    key INTEGER PRIMARY KEY,
    type TEXT NOT NULL,
    namespace TEXT NOT NULL COLLATE NOCASE,
    name TEXT NOT NULL COLLATE NOCASE,
    id TEXT GENERATED ALWAYS AS (namespace || '/' || name) STORED,
    private INTEGER NOT NULL,
    created TEXT NOT NULL,
    modified TEXT NOT NULL,
    downloads INTEGER NOT NULL DEFAULT 0,
    head TEXT NOT NULL DEFAULT '',
    tags TEXT NOT NULL DEFAULT '[]',
    facts TEXT NOT NULL DEFAULT '{}',
    card TEXT NOT NULL DEFAULT 'null',
    paths TEXT NOT NULL DEFAULT '[]',
    UNIQUE (type, namespace, name)
);
CREATE INDEX IF NOT EXISTS repos_modified ON repos (type, modified, id);
CREATE INDEX IF NOT EXISTS repos_created ON repos (type, created, id);
CREATE INDEX IF NOT EXISTS repos_downloads ON repos (type, downloads, id);
CREATE TABLE IF NOT EXISTS repo_tags (
    tag TEXT NOT NULL COLLATE NOCASE,
    repo INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE,
    PRIMARY KEY (tag, repo)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS tags_of_repo ON repo_tags (repo);

CREATE TABLE IF NOT EXISTS trees (digest TEXT PRIMARY KEY, entries BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS commits (
    repo INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE,
    id TEXT NOT NULL,
    parent TEXT,
    tree TEXT NOT NULL REFERENCES trees,
    title TEXT NOT NULL,
    message TEXT NOT NULL,
    author TEXT NOT NULL,
    date TEXT NOT NULL,
    PRIMARY KEY (repo, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS commits_by_tree ON commits (tree);
CREATE TABLE IF NOT EXISTS refs (
    repo INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE,
    name TEXT NOT NULL,
    target TEXT NOT NULL,
    PRIMARY KEY (repo, name)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS contents (sha256 TEXT PRIMARY KEY, data BLOB NOT NULL, at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS repo_files (
    sha256 TEXT NOT NULL,
    repo INTEGER NOT NULL REFERENCES repos ON DELETE CASCADE,
    PRIMARY KEY (sha256, repo)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS files_of_repo ON repo_files (repo);
CREATE TABLE IF NOT EXISTS uploads (
    sha256 TEXT NOT NULL,
    user TEXT NOT NULL,
    at TEXT NOT NULL,
    PRIMARY KEY (sha256, user)
) WITHOUT ROWID;
"""
_VERSION = 1  # of the schema; folders from before there were versions have 0, and the same schema
_BUSY_S = 30.0


class Database:
    """One SQLite file in WAL mode.

    `read` and `write` lend connections; inside another of the same thread, each joins it. Other processes, such
    as `loramux hub token`, may write too: SQLite itself lets them wait for each other.

    Raises:
        RunError: the file has a schema of another version.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._idle: deque[sqlite3.Connection] = deque()
        self._lock = threading.RLock()
        self._reading = threading.local()  # the connection of the outermost `read` of each thread
        self._writer = self._connect()
        self._refuse_unknown_versions()
        self._writer.execute("PRAGMA journal_mode = WAL")
        self._writer.executescript(f"{_SCHEMA}PRAGMA user_version = {_VERSION};")

    def _refuse_unknown_versions(self) -> None:
        (found,) = self._writer.execute("PRAGMA user_version").fetchone()
        if found not in (0, _VERSION):
            self._writer.close()
            raise RunError(
                f"{self._file}: a hub of version {found}; this loramux knows versions up to {_VERSION}: use the one "
                "that made it, or a newer one"
            )

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees one committed state to the end of the block, or the open `write` of this thread."""
        if self._is_writing_here():
            yield self._writer
            return
        outer: sqlite3.Connection | None = getattr(self._reading, "connection", None)
        if outer is not None:
            yield outer
            return
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        connection.execute("BEGIN")
        self._reading.connection = connection
        try:
            yield connection
        finally:
            self._reading.connection = None
            connection.execute("ROLLBACK")  # nothing was written
            self._idle.append(connection)

    def _is_writing_here(self) -> bool:
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._writer.in_transaction
        finally:
            self._lock.release()

    @contextmanager
    def write(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A transaction: all of the block or, after an error, nothing of it.

        Args:
            durable: wait for the disk. Without it the transaction may be lost with the power (not with the process),
                or reach the disk with a later one.
        """
        with self._lock:
            if self._writer.in_transaction:
                yield self._writer
                return
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            while self._idle:
                self._idle.pop().close()
            self._writer.close()
