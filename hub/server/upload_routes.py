"""Files into repos: what to send how, commits, and large files by LFS."""

import asyncio
import base64
import binascii
import hashlib
import re
import secrets
import sqlite3
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .errors import HubError
from .history import Add, Delete, History
from .names import check_path
from .repos import Repo
from .routing import Call, parse_json, read_lines, route, stream_route
from .tree import Entry

_WRITTEN_AT_ONCE = 2 << 20  # bytes that a thread hashes and writes in one go
_KEPT_AT_ONCE = 4 << 20  # bytes of small files that are written to the database in one go
_MAX_CHANGES = 50_000


@route("POST", "/api/{type}/{repo}/preupload/{revision}")
def choose_modes(call: Call) -> Response:
    """Which files come inside the commit (`regular`) and which apart (`lfs`), and which are here already."""
    repo = call.hub.storage.repos.find_for_writing(call.repo_id, call.caller)
    _, tree = call.hub.storage.history.at(repo.key, call.arguments["revision"])
    told, large = [], 0
    for file in call.field("files", list):
        path, size = _text(file, "path"), _integer(file, "size")
        check_path(path)
        mode, there = "lfs" if size > call.hub.policy.inline_bytes else "regular", tree.get(path)
        if mode == "lfs" and (there is None or there.size != size):  # of the same size, it is likely the same file
            large += size
        told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": _known(there, mode)})
    free = call.hub.storage.free_bytes()
    if large > free:  # told before anything is sent
        raise HubError(507, f"The hub's disk has {free} bytes left, and these files have {large}: nothing was kept.")
    return JSONResponse({"files": told})


def _known(entry: Entry | None, mode: str) -> str | None:
    """The hash by which a client sees that its file is unchanged."""
    if entry is None or entry.is_lfs != (mode == "lfs"):
        return None
    return entry.etag


@stream_route("POST", "/api/{type}/{repo}/commit/{revision}")
async def commit(call: Call) -> Response:
    """One commit out of lines of JSON: a header, small files, the names of large ones, deletions."""
    if call.flag("create_pr"):
        raise HubError(400, "This hub has no pull requests: commit to a branch instead.")
    repo = await run_in_threadpool(call.hub.storage.repos.find_for_writing, call.repo_id, call.caller)
    small = _SmallFiles(call.hub.storage.history)
    try:
        header, changes = await _read_commit(call, small)
        commit_id = await run_in_threadpool(_apply, call, repo, header, changes)
    finally:
        await small.settle()
    address = f"{call.base}{repo.id.page}"
    told = {"success": True, "commitOid": commit_id, "commitUrl": f"{address}/commit/{commit_id}", "hookOutput": ""}
    return JSONResponse(told)


def _apply(call: Call, repo: Repo, header: dict[str, Any], changes: list[Add | Delete]) -> str:
    parent = header.get("parentCommit")
    return call.hub.storage.history.apply(
        repo.key,
        call.arguments["revision"],
        changes,
        caller=call.caller,
        title=str(header.get("summary", "")),
        message=str(header.get("description", "")),
        parent=None if parent is None else str(parent),
    )


class _SmallFiles:
    """The small files of one commit on their way into the database, a few megabytes at a time."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._waiting: dict[str, bytes] = {}
        self._added: set[str] = set()
        self._size = 0

    async def add(self, data: bytes) -> str:
        """Take a file in; returns its sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        self._waiting[sha256] = data
        self._size += len(data)
        if self._size > _KEPT_AT_ONCE:
            await self.flush()
        return sha256

    async def flush(self) -> None:
        await run_in_threadpool(self._history.add_contents, self._waiting, self._added)
        self._waiting, self._size = {}, 0

    async def settle(self) -> None:
        """Give back the room of what was not committed. A full disk may forbid it; `loramux hub clean` does it then."""
        with suppress(sqlite3.OperationalError):
            await run_in_threadpool(self._history.settle_contents, self._added)


async def _read_commit(call: Call, small: _SmallFiles) -> tuple[dict[str, Any], list[Add | Delete]]:
    """The header and the changes of a commit; the contents of small files are in the database then."""
    header: dict[str, Any] = {}
    changes: list[Add | Delete] = []
    async for line in read_lines(call.request, call.hub.policy.inline_bytes * 4 // 3 + (64 << 10)):
        if not line.strip():
            continue
        operation = parse_json(line)
        kind, value = _text(operation, "key"), operation.get("value")
        if not isinstance(value, dict):
            raise HubError(400, f"The value of {kind[:50]!r} is not an object.")
        if kind == "header":
            header = value
        elif kind == "file":
            changes.append(Add(_text(value, "path"), await small.add(_content(value)), is_lfs=False))
        else:
            changes.append(_change(kind, value))
        if len(changes) > _MAX_CHANGES:
            raise HubError(413, f"A commit may have {_MAX_CHANGES} changes: split it.")
    await small.flush()
    return header, changes


def _content(value: dict[str, Any]) -> bytes:
    text = _text(value, "content")
    if value.get("encoding", "utf-8") != "base64":
        return text.encode()
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise HubError(400, f"The content of {str(value.get('path'))[:200]!r} is not base64: {error}") from None


def _change(kind: str, value: dict[str, Any]) -> Add | Delete:
    path = _text(value, "path")
    if kind == "lfsFile":
        return Add(path, _sha256(value), is_lfs=True)
    if kind in ("deletedFile", "deletedFolder"):
        return Delete(path, is_folder=kind == "deletedFolder")
    raise HubError(400, f"Unknown operation {kind[:50]!r}: a commit has file, lfsFile, deletedFile and deletedFolder.")


@route("POST", "{prefix}/{repo}.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Response:
    """Where to send large files; those that the caller's repos have already need not be sent."""
    call.hub.storage.repos.find_for_writing(call.repo_id, call.caller)
    if call.field("operation") != "upload":
        raise HubError(400, "LFS is for uploads here: download files from their addresses in the repo.")
    actions = [_lfs_object(call, object_) for object_ in call.field("objects", list)]
    in_parts = any("header" in told.get("actions", {}).get("upload", {}) for told in actions)
    told = {"transfer": "multipart" if in_parts else "basic", "objects": actions}
    return JSONResponse(told, media_type="application/vnd.git-lfs+json")


def _lfs_object(call: Call, object_: Any) -> dict[str, Any]:
    sha256, size = _sha256(object_), _integer(object_, "size")
    policy, user = call.hub.policy, call.caller.require_user()
    told: dict[str, Any] = {"oid": sha256, "size": size}
    if size > policy.max_file_bytes:
        message = f"A file of {size} bytes is larger than this hub takes ({policy.max_file_bytes})."
        return {**told, "error": {"code": 413, "message": message}}
    if call.hub.storage.history.may_use(sha256, call.caller):
        call.hub.storage.files.touch(sha256)
        return told

    def link(path: str) -> str:
        return call.base + call.hub.links.sign(path, user)

    upload: dict[str, Any] = {"href": link(f"/_lfs/{sha256}/{size}")}
    if size > policy.part_bytes:
        start = f"/_lfs/{sha256}/{size}/{secrets.token_hex(8)}"
        parts = range(1, -(-size // policy.part_bytes) + 1)
        header = {f"{part:05d}": link(f"{start}/{part}") for part in parts}
        upload = {"href": link(f"{start}/complete"), "header": {"chunk_size": str(policy.part_bytes), **header}}
    return {**told, "actions": {"upload": upload, "verify": {"href": link(f"/_lfs/{sha256}/{size}/verify")}}}


@stream_route("PUT", "/_lfs/{sha256}/{size}", has_own_rights=True)
async def lfs_put(call: Call) -> Response:
    """The whole of a large file."""
    user, sha256, size = _check_link(call), call.arguments["sha256"], int(call.arguments["size"])
    with call.hub.storage.files.receive() as incoming:
        await receive(call.request, incoming, size)
        await run_in_threadpool(incoming.keep, sha256=sha256, size=size)
    await run_in_threadpool(call.hub.storage.history.record_upload, sha256, user)
    return Response()


@stream_route("PUT", "/_lfs/{sha256}/{size}/{upload}/{number}", has_own_rights=True)
async def lfs_part(call: Call) -> Response:
    """One part of a large file, written to its place."""
    _check_link(call)
    size, part, part_bytes = int(call.arguments["size"]), int(call.arguments["number"]), call.hub.policy.part_bytes
    start = (part - 1) * part_bytes
    wanted = min(part_bytes, size - start)
    partial = call.hub.storage.files.open_partial(call.arguments["upload"])
    with partial.writer_at(start) as writer:
        await receive(call.request, writer, wanted)
    if writer.size != wanted:
        raise HubError(400, f"Part {part} has {writer.size} bytes, not {wanted}.")
    return Response(headers={"ETag": f'"{part}"'})


@route("POST", "/_lfs/{sha256}/{size}/{upload}/complete", has_own_rights=True)
def lfs_complete(call: Call) -> Response:
    user, sha256, size = _check_link(call), call.arguments["sha256"], int(call.arguments["size"])
    history, partial = call.hub.storage.history, call.hub.storage.files.open_partial(call.arguments["upload"])
    with partial.closed():
        if history.was_sent_by(sha256, size, user=user):  # clients ask again when the answer got lost
            partial.discard()
        else:
            partial.keep(sha256, size)
            history.record_upload(sha256, user)
    return JSONResponse({})


@route("POST", "/_lfs/{sha256}/{size}/verify", has_own_rights=True)
def lfs_verify(call: Call) -> Response:
    user, sha256, size = _check_link(call), call.arguments["sha256"], int(call.arguments["size"])
    if not call.hub.storage.history.was_sent_by(sha256, size, user=user):
        raise HubError(404, f"sha256 {sha256} was not uploaded.")
    return JSONResponse({})


def _check_link(call: Call) -> str:
    path = call.request.scope["raw_path"].decode("latin-1").split("?")[0]
    path = path.removeprefix(call.request.scope.get("root_path", ""))
    return call.hub.links.check(path, call.request.query_params)


class Sink(Protocol):
    def write_all(self, pieces: list[bytes]) -> None: ...


async def receive(request: Request, sink: Sink, limit: int) -> None:
    """Write a body to a file beside the event loop: one piece is written while the next comes in.

    Raises:
        HubError: 413, there is more than `limit` bytes.
    """
    writing: asyncio.Task[None] | None = None
    try:
        async for pieces in _pieces(request, limit):
            if writing is not None:
                await writing
            writing = asyncio.create_task(run_in_threadpool(sink.write_all, pieces))
        if writing is not None:
            await writing
    finally:  # whoever closes the file must not do so under a thread that writes
        if writing is not None:
            await asyncio.wait([writing])


async def _pieces(request: Request, limit: int) -> AsyncIterator[list[bytes]]:
    waiting: list[bytes] = []
    pending = total = 0
    async for part in request.stream():
        waiting.append(part)
        pending, total = pending + len(part), total + len(part)
        if total > limit:
            raise HubError(413, f"The body is larger than the {limit} bytes that were announced or are allowed.")
        if pending >= _WRITTEN_AT_ONCE:
            yield waiting
            waiting, pending = [], 0
    yield waiting


def _text(value: Any, name: str) -> str:
    text = value.get(name) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise HubError(400, f"A text {name!r} is missing.")
    return text


def _integer(value: Any, name: str) -> int:
    number = value.get(name) if isinstance(value, dict) else None
    if not isinstance(number, int) or number < 0:
        raise HubError(400, f"A number {name!r} from 0 on is missing.")
    return number


def _sha256(value: Any) -> str:
    text = _text(value, "oid")
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise HubError(400, f"Invalid oid {text[:100]!r}: it is not a sha256 in hex.")
    return text
