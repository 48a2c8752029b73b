"""The repos of a hub: made, found, listed in pages, moved and deleted."""

import base64
import json
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .accounts import Caller
from .clock import now
from .database import Database
from .errors import HubError, repo_not_found
from .history import History
from .metadata import read_json
from .names import RepoId

MAX_PAGE = 1000
_SORTS = {"lastModified": "modified", "createdAt": "created", "downloads": "downloads"}
_LISTED = "key, type, namespace, name, id, private, created, modified, downloads, head, tags, facts"
_DETAILS = ", card, paths"


@dataclass(frozen=True)
class Repo:
    """A repo as listings show it; `card` and `paths` are None unless they were asked for."""

    key: int
    id: RepoId
    private: bool
    created: str
    modified: str
    downloads: int
    head: str
    tags: list[str]
    facts: dict[str, Any]
    card: dict[str, Any] | None = None
    paths: list[str] | None = None


@dataclass(frozen=True)
class Query:
    """Which repos to list.

    Attributes:
        tags: all of which a repo must have.
        name: a part of its id.
        words: each must be in its id or one of its tags.
        after: where the page before this one ended.
    """

    type: str
    tags: Sequence[str] = ()
    author: str | None = None
    name: str | None = None
    words: Sequence[str] = ()
    sort: str = "lastModified"
    limit: int = MAX_PAGE
    after: str | None = None
    with_details: bool = False


@dataclass(frozen=True)
class Page:
    """Some repos, and where the next page starts; None after the last."""

    repos: list[Repo]
    next: str | None


@dataclass
class _Where:
    """The conditions of a query, with their values."""

    conditions: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def add(self, condition: str, *values: Any) -> None:
        self.conditions.append(condition)
        self.values += values

    def __str__(self) -> str:
        return " AND ".join(f"({condition})" for condition in self.conditions)


class Repos:
    def __init__(self, database: Database, history: History) -> None:
        self._database, self._history = database, history

    def create(self, repo: RepoId, *, private: bool, author: str) -> None:
        """Make a repo with one empty commit.

        Raises:
            HubError: 409, it is there already.
        """
        with self._database.write() as connection:
            try:
                key = connection.execute(
                    "INSERT INTO repos (type, namespace, name, private, created, modified) VALUES (?, ?, ?, ?, ?, ?)",
                    (repo.type, repo.namespace, repo.name, private, now(), now()),
                ).lastrowid
            except sqlite3.IntegrityError:
                raise _taken(repo) from None
            self._history.start(int(key or 0), author)

    def delete(self, repo: RepoId) -> None:
        """Delete a repo. Its large files stay until `loramux hub clean`, since other repos may have them too."""
        with self._database.write() as connection:
            where = (repo.type, repo.namespace, repo.name)
            connection.execute("DELETE FROM repos WHERE type = ? AND namespace = ? AND name = ?", where)

    def move(self, source: Repo, target: RepoId) -> None:
        with self._database.write() as connection:
            try:
                connection.execute(
                    "UPDATE repos SET namespace = ?, name = ? WHERE key = ?",
                    (target.namespace, target.name, source.key),
                )
            except sqlite3.IntegrityError:
                raise _taken(target) from None

    def set_private(self, repo: Repo, private: bool) -> None:
        with self._database.write() as connection:
            connection.execute("UPDATE repos SET private = ? WHERE key = ?", (private, repo.key))

    def count_download(self, repo: Repo) -> None:
        """Count a download, if the database takes it: on a full disk downloads go on uncounted."""
        with suppress(sqlite3.OperationalError), self._database.write(durable=False) as connection:
            connection.execute("UPDATE repos SET downloads = downloads + 1 WHERE key = ?", (repo.key,))

    def find(self, repo: RepoId, caller: Caller) -> Repo:
        """The repo, if the caller may see it.

        Raises:
            HubError: 404 with the code RepoNotFound, whether it is missing or hidden.
        """
        with self._database.read() as connection:
            row = connection.execute(
                f"SELECT {_LISTED}{_DETAILS} FROM repos WHERE type = ? AND namespace = ? AND name = ?",
                (repo.type, repo.namespace, repo.name),
            ).fetchone()
        if row is None or (row["private"] and not caller.belongs_to(row["namespace"])):
            raise repo_not_found(repo)
        return _repo(row)

    def find_for_writing(self, repo: RepoId, caller: Caller) -> Repo:
        """The repo, if the caller may write to it.

        Raises:
            HubError: as `find`; 401 and 403 where the caller sees the repo but may not change it.
        """
        found = self.find(repo, caller)
        caller.require_writer(found.id.namespace)
        return found

    def list(self, query: Query, caller: Caller) -> Page:
        """One page of the repos that the caller may see, the newest (or most downloaded) first.

        Raises:
            HubError: 400, the cursor is none of ours.
        """
        column = _SORTS.get(query.sort, "modified")
        where = _matching(query, caller)
        if query.after is not None:
            where.add(f"({column}, id) < (?, ?)", *_read_cursor(query.after))
        details = _DETAILS if query.with_details else ""
        with self._database.read() as connection:
            rows = connection.execute(
                f"SELECT {_LISTED}{details} FROM repos WHERE {where} ORDER BY {column} DESC, id DESC LIMIT ?",
                (*where.values, query.limit + 1),
            ).fetchall()
        page, has_more = rows[: query.limit], len(rows) > query.limit
        cursor = _cursor(page[-1][column], page[-1]["id"]) if has_more and page else None
        return Page([_repo(row) for row in page], cursor)

    def tag_counts(self, prefix: str, type_: str, caller: Caller) -> dict[str, int]:
        """How many visible repos have each tag that starts so, the most frequent first."""
        where = _matching(Query(type_), caller)
        with self._database.read() as connection:
            rows = connection.execute(
                f"SELECT tag, count(*) AS repos FROM repo_tags JOIN repos ON repo = key WHERE {where} "
                "AND tag >= ? AND tag < ? GROUP BY tag ORDER BY repos DESC, tag LIMIT 200",
                (*where.values, prefix, prefix + "\U0010ffff"),
            )
            return {row["tag"]: row["repos"] for row in rows}


def _matching(query: Query, caller: Caller) -> _Where:
    where = _Where()
    where.add("type = ?", query.type)
    if caller.namespaces is not None:
        names = sorted(caller.namespaces)
        marks = ", ".join("?" for _ in names)
        where.add(f"private = 0 OR namespace IN ({marks})", *names)
    if query.author:
        where.add("namespace = ?", query.author)
    if query.name:
        where.add("id LIKE ? ESCAPE '!'", _part(query.name))
    for word in query.words:
        tagged = "SELECT 1 FROM repo_tags WHERE repo = key AND tag LIKE ? ESCAPE '!'"
        where.add(f"id LIKE ? ESCAPE '!' OR EXISTS ({tagged})", _part(word), _part(word))
    for tag in query.tags:
        where.add("key IN (SELECT repo FROM repo_tags WHERE tag = ?)", tag)
    return where


def _part(text: str) -> str:
    for special in "!%_":
        text = text.replace(special, f"!{special}")
    return f"%{text}%"


def _cursor(value: str | int, repo: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([value, repo]).encode()).decode()


def _read_cursor(text: str) -> tuple[str | int, str]:
    try:
        read = read_json(base64.urlsafe_b64decode(text))
    except ValueError:
        read = None
    match read:
        case [str() | int() as value, str() as repo]:
            return value, repo
    raise HubError(400, f"Invalid cursor {text[:100]!r}: follow the links of the answers instead.")


def _repo(row: sqlite3.Row) -> Repo:
    has_details = "card" in row.keys()  # noqa: SIM118, a row iterates over its values
    return Repo(
        key=row["key"],
        id=RepoId(row["type"], row["namespace"], row["name"]),
        private=bool(row["private"]),
        created=row["created"],
        modified=row["modified"],
        downloads=row["downloads"],
        head=row["head"],
        tags=json.loads(row["tags"]),
        facts=json.loads(row["facts"]),
        card=json.loads(row["card"]) if has_details else None,
        paths=json.loads(row["paths"]) if has_details else None,
    )


def _taken(repo: RepoId) -> HubError:
    return HubError(409, f"You already created this {repo.type[:-1]} repo: {repo}")
