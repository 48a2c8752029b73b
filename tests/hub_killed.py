"""Run as a program: kill a hub at every point where it writes, start it again, and see what is left.

    python hub_killed.py FOLDER

Each try runs in a fork that ends by SIGKILL before, or after, its Nth sync, rename or commit. One JSON line per try.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hub_uploads import commit_lines, large, send_lfs, sha256, shard, small, xet_session, xorb
from starlette.testclient import TestClient

from loramux.hub.server import Hub, Policy, Storage
from loramux.hub.server.accounts import ANYBODY
from loramux.hub.server.names import RepoId

REPO = RepoId("models", "someone", "killed")
BY_LFS, BY_XET = b"lfs" * 1000, b"xet" * 1000
OLD = {"old.txt"}
NEW = {"old.txt", "small.txt", "lfs.bin", "xet.bin"}


class Bomb:
    """Ends the process at the `fuse`-th write point it passes."""

    def __init__(self, fuse: int) -> None:
        self.fuse, self.passed = fuse, 0

    def pass_by(self) -> None:
        self.passed += 1
        if self.passed == self.fuse:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        self.pass_by()
        yield
        self.pass_by()

    def arm(self) -> None:
        """Lie before and after everything that makes a state lasting: syncs, renames, commits of the database."""
        bomb, connect = self, sqlite3.connect

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
                with bomb.around() if sql == "COMMIT" else contextlib.nullcontext():
                    return super().execute(sql, *arguments)

        def guard(function: Callable[..., Any]) -> Callable[..., Any]:
            def guarded(*arguments: Any, **named: Any) -> Any:
                with self.around():
                    return function(*arguments, **named)

            return guarded

        os.fsync, os.replace = guard(os.fsync), guard(os.replace)
        sqlite3.connect = lambda *arguments, **named: connect(*arguments, **named, factory=Connection)


def upload(root: Path, bomb: Bomb | None = None) -> None:
    """Send a file by LFS and one by Xet, and commit both with a small one; a note says when the hub has said yes."""
    if bomb is not None:
        bomb.arm()
    storage = Storage(root)
    web = TestClient(Hub(storage, Policy(inline_bytes=100)), base_url="http://localhost")
    if bomb is not None:
        bomb.passed = 0
    send_lfs(web, str(REPO), BY_LFS)
    address, right = xet_session(web, str(REPO))
    web.post(f"{address}/v1/xorbs/default/{'cd' * 32}", content=xorb(BY_XET), headers=right)
    web.post(f"{address}/v1/shards", content=shard("cd" * 32, len(BY_XET), 1, sha256(BY_XET)), headers=right)
    files = (small("small.txt", b"small"), large("lfs.bin", BY_LFS), large("xet.bin", BY_XET))
    answer = web.post(f"/api/models/{REPO}/commit/main", content=commit_lines(*files))
    if answer.is_success:
        (root / "acknowledged").touch()
    storage.close()


def look(root: Path) -> dict[str, Any]:
    """What the hub shows after a start, and everything about it that should not be so."""
    acknowledged = (root / "acknowledged").exists()
    hub = Hub(Storage(root), Policy(inline_bytes=100))
    storage = hub.storage
    key = storage.repos.find(REPO, ANYBODY).key
    tree = storage.history.tree(key, storage.history.resolve(key, "main"))
    wrong = [path for path, entry in tree.items() if _hash_of(storage, entry.sha256) != entry.sha256]
    kept = [path for path in (root / "files").rglob("*") if path.is_file()]
    wrong += [str(path) for path in kept if hashlib.sha256(path.read_bytes()).hexdigest() != path.name]
    wrong += [str(path) for folder in ("incoming", "xorbs") for path in (root / folder).iterdir()]
    state = {"old": OLD, "new": NEW}
    found = next((name for name, files in state.items() if files == tree.keys()), f"neither: {sorted(tree)}")
    if acknowledged and found != "new":
        wrong.append("a commit that was acknowledged is lost")
    storage.close()
    return {"state": found, "acknowledged": acknowledged, "wrong": wrong}


def _hash_of(storage: Storage, sha256_: str) -> str:
    data = storage.history.content(sha256_)
    return sha256(data if data is not None else storage.files.path(sha256_).read_bytes())


def in_a_fork(do: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether the fork lived to its end, and what it returned."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
        return status == 0, json.loads(told) if told else None
    os.write(writing, json.dumps(do()).encode())
    os._exit(0)


def start(root: Path) -> None:
    storage = Storage(root)
    storage.repos.create(REPO, private=False, author="someone")
    web = TestClient(Hub(storage), base_url="http://localhost")
    assert web.post(f"/api/models/{REPO}/commit/main", content=commit_lines(small("old.txt", b"old"))).is_success
    storage.close()


def main(folder: Path) -> None:
    in_a_fork(lambda: start(folder / "start"))
    lived, fuse = False, 0
    while not lived:
        fuse += 1
        root = folder / str(fuse)
        shutil.copytree(folder / "start", root)
        lived, _ = in_a_fork(lambda root=root, fuse=fuse: upload(root, Bomb(fuse)))
        _, seen = in_a_fork(lambda root=root: look(root))
        _, again = in_a_fork(lambda root=root: (upload(root), look(root))[1])
        print(json.dumps({"point": fuse, "killed": not lived, "seen": seen, "again": again}), flush=True)
        shutil.rmtree(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
