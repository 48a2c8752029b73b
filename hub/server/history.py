"""What is in a repo: trees of files, commits, branches and tags."""

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .accounts import Caller
from .clock import now
from .database import Database
from .errors import HubError, repo_not_found
from .files import Files
from .metadata import CardError, card_metadata, describe, read_json
from .names import MAIN, check_path, check_reference
from .tree import ADAPTER_CONFIG, Draft, Entry, RecentTrees, Tree, git_oid, lfs_pointer

CARD = "README.md"
_TREES_KEPT = 1 << 17  # files in all trees that are kept in memory, some 600 bytes each
_SHORT_ID = 7  # characters of a commit's id that stand for it
_MAX_ADAPTERS = 20  # of a repo whose configs the hub looks at
_MAX_READ = 1 << 20  # bytes of a card or a config that the hub itself reads


@dataclass(frozen=True)
class Add:
    path: str
    sha256: str
    is_lfs: bool


@dataclass(frozen=True)
class Delete:
    path: str
    is_folder: bool


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    tree: str
    title: str
    message: str
    author: str
    date: str


class History:
    """Commits of all repos; `key` is a repo's number in the database."""

    def __init__(self, database: Database, files: Files) -> None:
        self._database, self._files = database, files
        self._trees = RecentTrees(self._load_tree, _TREES_KEPT)
        self._under_way: dict[int, set[str]] = {}

    # Contents

    def add_contents(self, contents: Mapping[str, bytes], added: set[str]) -> None:
        """Keep small files, by their sha256, in the database. They reach the disk before the commit that names them.

        Args:
            added: what one commit has added; until `settle_contents`, none of it is dropped because of another commit.
        """
        self._under_way[id(added)] = added
        added.update(contents)
        with self._database.write(durable=False) as connection:
            connection.executemany(
                "INSERT INTO contents VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET at = excluded.at",
                [(sha256, data, now()) for sha256, data in contents.items()],
            )

    def settle_contents(self, added: set[str]) -> None:
        """The commit is over: of the small files it added, drop those that no commit, made or under way, names."""
        self._under_way.pop(id(added), None)
        with self._database.write(durable=False) as connection:
            others = [*self._under_way.values()]
            connection.executemany(
                "DELETE FROM contents WHERE sha256 = ? AND sha256 NOT IN (SELECT sha256 FROM repo_files)",
                [(sha256,) for sha256 in added if not any(sha256 in other for other in others)],
            )

    def content(self, sha256: str) -> bytes | None:
        """A small file; None where the content is a file on the disk, or nowhere."""
        with self._database.read() as connection:
            row = connection.execute("SELECT data FROM contents WHERE sha256 = ?", (sha256,)).fetchone()
        return row["data"] if row else None

    def record_upload(self, sha256: str, user: str) -> None:
        """Remember who sent a large file, and so may commit it."""
        with self._database.write(durable=False) as connection:
            connection.execute("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?)", (sha256, user, now()))

    def was_sent_by(self, sha256: str, size: int | None = None, *, user: str) -> bool:
        """Whether the file is here, of this size where one is given, and this user sent it."""
        with self._database.read() as connection:
            sent = connection.execute("SELECT 1 FROM uploads WHERE sha256 = ? AND user = ?", (sha256, user)).fetchone()
        found = self._files.size(sha256)
        return sent is not None and found is not None and size in (None, found)

    def may_use(self, sha256: str, caller: Caller) -> bool:
        """Whether the caller has the content already: it sent it, or may read a repo that has it.

        To know a hash is not to have the file: naming the hash of a private file must not give its content away.
        """
        if self._files.size(sha256) is None:
            return False
        if self.was_sent_by(sha256, user=caller.require_user()):
            return True
        with self._database.read() as connection:
            rows = connection.execute(
                "SELECT private, namespace FROM repo_files JOIN repos ON repo = key WHERE sha256 = ?", (sha256,)
            )
            return any(not row["private"] or caller.belongs_to(row["namespace"]) for row in rows)

    # Reading

    def resolve(self, key: int, revision: str) -> str:
        """The commit a branch, a tag, a full reference or the start of a commit's id stands for.

        Raises:
            HubError: 404 with the code RevisionNotFound.
        """
        with self._database.read() as connection:
            for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
                row = connection.execute("SELECT target FROM refs WHERE repo = ? AND name = ?", (key, name)).fetchone()
                if row:
                    return row["target"]
            if len(revision) >= 6 and set(revision) <= set("0123456789abcdef"):
                rows = connection.execute(
                    "SELECT id FROM commits WHERE repo = ? AND id >= ? AND id < ? LIMIT 2",
                    (key, revision, revision + "g"),
                ).fetchall()
                if len(rows) == 1:
                    return rows[0]["id"]
        raise HubError(404, f"Invalid rev id: {revision[:200]}", "RevisionNotFound")

    def commit(self, key: int, commit_id: str) -> Commit:
        with self._database.read() as connection:
            row = connection.execute(
                "SELECT id, parent, tree, title, message, author, date FROM commits WHERE repo = ? AND id = ?",
                (key, commit_id),
            ).fetchone()
        if row is None:
            raise HubError(404, f"Invalid rev id: {commit_id}", "RevisionNotFound")
        return Commit(**dict(row))

    def tree(self, key: int, commit_id: str) -> Tree:
        return self._trees.read(self.commit(key, commit_id).tree)

    def at(self, key: int, revision: str) -> tuple[Commit, Tree]:
        """The commit that a revision stands for, and its files."""
        with self._database.read():  # one state: a squash must not come between
            commit = self.commit(key, self.resolve(key, revision))
            return commit, self._trees.read(commit.tree)

    def log(self, key: int, commit_id: str, *, skip: int, limit: int) -> list[Commit]:
        """Commits from `commit_id` back, the newest first."""
        with self._database.read() as connection:
            rows = connection.execute(
                "WITH RECURSIVE line(depth, id) AS (SELECT 0, ? UNION ALL SELECT depth + 1, parent FROM line "
                "JOIN commits USING (id) WHERE repo = ? AND parent IS NOT NULL) "
                "SELECT id, parent, tree, title, message, author, date FROM line JOIN commits USING (id) "
                "WHERE repo = ? ORDER BY depth LIMIT ? OFFSET ?",
                (commit_id, key, key, limit, skip),
            )
            return [Commit(**dict(row)) for row in rows]

    def refs(self, key: int) -> dict[str, str]:
        with self._database.read() as connection:
            rows = connection.execute("SELECT name, target FROM refs WHERE repo = ? ORDER BY name", (key,))
            return {row["name"]: row["target"] for row in rows}

    def text(self, entry: Entry | None) -> str | None:
        """A file as text, for the hub's own use; None where it is missing or too large to be meant for that."""
        data = self._bytes(entry)
        return None if data is None else data.decode("utf-8", "replace")

    def first_adapter(self, tree: Tree) -> tuple[str, Any] | None:
        """Folder and config of the adapter that stands for a tree: its first plain LoRA, or its first of any kind."""
        paths = [path for path in tree if path.rsplit("/", 1)[-1] == ADAPTER_CONFIG][:_MAX_ADAPTERS]
        found = [
            (path.removesuffix(ADAPTER_CONFIG).rstrip("/"), read_json(self._bytes(tree[path]) or b"") or {})
            for path in paths
        ]
        plain = (one for one in found if isinstance(one[1], dict) and one[1].get("peft_type") == "LORA")
        return next(plain, found[0] if found else None)

    def _bytes(self, entry: Entry | None) -> bytes | None:
        if entry is None or entry.size > _MAX_READ:
            return None
        data = self.content(entry.sha256)
        return data if data is not None else self._files.path(entry.sha256).read_bytes()

    # Writing

    def start(self, key: int, author: str) -> None:
        """The empty first commit of a new repo."""
        with self._database.write():
            self._point(key, MAIN, self._record(key, None, Tree(), "initial commit", "", author), Tree())

    def apply(
        self,
        key: int,
        branch: str,
        changes: Iterable[Add | Delete],
        *,
        caller: Caller,
        title: str,
        message: str = "",
        parent: str | None = None,
    ) -> str:
        """Make one commit of all changes, or none.

        Args:
            parent: the commit the changes were made for, or the start of its id; any, where it is None.

        Returns:
            the new commit.

        Raises:
            HubError: 412, `parent` is not the newest commit any more; 422, a file was not uploaded; 404, there is no
                such branch, or no such file to delete; 400, paths that no tree can have.
        """
        reference = branch if branch.startswith("refs/") else f"refs/heads/{branch}"
        with self._database.write() as connection:
            if not connection.execute("SELECT 1 FROM repos WHERE key = ?", (key,)).fetchone():
                raise repo_not_found(key)
            head = self.refs(key).get(reference)
            if head is None or not reference.startswith("refs/heads/"):
                raise HubError(404, f"There is no branch {branch[:200]!r} to commit to.", "RevisionNotFound")
            if parent is not None and not (len(parent) >= _SHORT_ID and head.startswith(parent)):
                raise HubError(412, f"A commit has happened since {parent[:40]}: the branch is at {head} now.")
            draft = Draft(self.tree(key, head))
            for change in changes:
                self._change(draft, change, caller)
            tree = draft.finish()
            author = caller.require_user()
            commit = self._record(key, head, tree, title, message, author)
            self._point(key, reference, commit, tree)
        return commit

    def squash(self, key: int, branch: str, title: str, author: str) -> None:
        """Forget how a branch came about: one commit holds all its files, and what no other branch or tag reaches is
        gone with the commits that had it."""
        reference = check_reference(f"refs/heads/{branch}")
        with self._database.write():
            tree = self.tree(key, self.resolve(key, reference))
            self._point(key, reference, self._record(key, None, tree, title, "", author), tree)
            self.forget_unreached(key)

    def forget_unreached(self, key: int) -> None:
        """Drop the commits of a repo that no branch and no tag leads to, and its claim to files that only they had."""
        with self._database.write() as connection:
            dropped = connection.execute(
                "WITH RECURSIVE reached(id) AS (SELECT target FROM refs WHERE repo = :key UNION "
                "SELECT parent FROM reached JOIN commits USING (id) WHERE repo = :key AND parent IS NOT NULL) "
                "DELETE FROM commits WHERE repo = :key AND id NOT IN reached RETURNING tree",
                {"key": key},
            ).fetchall()
            kept = {row["tree"] for row in connection.execute("SELECT tree FROM commits WHERE repo = ?", (key,))}
            gone = self._files_of({row["tree"] for row in dropped} - kept)
            if gone:
                gone -= self._files_of(kept)
            connection.executemany(
                "DELETE FROM repo_files WHERE repo = ? AND sha256 = ?", [(key, sha256) for sha256 in gone]
            )

    def _files_of(self, trees: set[str]) -> set[str]:
        return {entry.sha256 for digest in trees for entry in self._load_tree(digest).values()}

    def add_ref(self, key: int, reference: str, revision: str) -> None:
        check_reference(reference)
        with self._database.write() as connection:
            target = self.resolve(key, revision)
            try:
                connection.execute("INSERT INTO refs VALUES (?, ?, ?)", (key, reference, target))
            except sqlite3.IntegrityError:
                raise HubError(409, f"Reference {reference} already exists.") from None

    def remove_ref(self, key: int, reference: str) -> None:
        check_reference(reference)
        if reference == MAIN:
            raise HubError(400, "The branch 'main' cannot be deleted: every repo has it.")
        with self._database.write() as connection:
            if not connection.execute("DELETE FROM refs WHERE repo = ? AND name = ?", (key, reference)).rowcount:
                raise HubError(404, f"Reference {reference} does not exist.", "RevisionNotFound")

    def _change(self, draft: Draft, change: Add | Delete, caller: Caller) -> None:
        path = check_path(change.path.rstrip("/"))
        if isinstance(change, Add):
            draft.put(path, self._entry(change, caller))
        elif change.is_folder:
            draft.delete_folder(path)
        else:
            draft.delete(path)

    def _entry(self, add: Add, caller: Caller) -> Entry:
        if add.is_lfs:
            size = self._files.size(add.sha256)
            if size is None or not self.may_use(add.sha256, caller):
                raise HubError(422, f"The content of {add.path!r}, sha256 {add.sha256}, was not uploaded.")
            return Entry(add.sha256, size, git_oid(lfs_pointer(add.sha256, size)), is_lfs=True)
        data = self.content(add.sha256)
        if data is None:
            raise HubError(422, f"The content of {add.path!r}, sha256 {add.sha256}, was not uploaded.")
        return Entry(add.sha256, len(data), git_oid(data), is_lfs=False)

    def _record(self, key: int, parent: str | None, tree: Tree, title: str, message: str, author: str) -> str:
        rows = [[path, *vars(entry).values()] for path, entry in tree.items()]
        entries = json.dumps(rows, separators=(",", ":")).encode()
        digest, date = hashlib.sha256(entries).hexdigest(), now()
        identity = json.dumps([key, parent, digest, title, message, author, date]).encode()
        commit = hashlib.sha1(identity, usedforsecurity=False).hexdigest()
        with self._database.write() as connection:
            connection.execute("INSERT OR IGNORE INTO trees VALUES (?, ?)", (digest, zlib.compress(entries)))
            connection.execute(
                "INSERT OR IGNORE INTO commits VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (key, commit, parent, digest, title[:1000], message, author, date),
            )
            connection.executemany(
                "INSERT OR IGNORE INTO repo_files VALUES (?, ?)", [(entry.sha256, key) for entry in tree.values()]
            )
        return commit

    def _load_tree(self, digest: str) -> Tree:
        with self._database.read() as connection:
            row = connection.execute("SELECT entries FROM trees WHERE digest = ?", (digest,)).fetchone()
        return Tree((path, Entry(*fields)) for path, *fields in json.loads(zlib.decompress(row["entries"])))

    def _point(self, key: int, reference: str, commit: str, tree: Tree) -> None:
        with self._database.write() as connection:
            connection.execute(
                "INSERT INTO refs VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET target = excluded.target",
                (key, reference, commit),
            )
            if reference == MAIN:
                self._describe(connection, key, commit, tree)

    def _describe(self, connection: sqlite3.Connection, key: int, commit: str, tree: Tree) -> None:
        """Write down what listings show, so that they need not open any file."""
        try:
            card: dict[str, Any] = card_metadata(self.text(tree.get(CARD)) or "")
        except CardError:
            card = {}
        adapter = self.first_adapter(tree)
        tags, facts = describe(tree, card, adapter and adapter[1])
        connection.execute(
            "UPDATE repos SET head = ?, modified = ?, tags = ?, facts = ?, card = ?, paths = ? WHERE key = ?",
            (commit, now(), json.dumps(tags), json.dumps(facts), json.dumps(card or None), json.dumps([*tree]), key),
        )
        connection.execute("DELETE FROM repo_tags WHERE repo = ?", (key,))
        connection.executemany("INSERT OR IGNORE INTO repo_tags VALUES (?, ?)", [(tag, key) for tag in tags])
