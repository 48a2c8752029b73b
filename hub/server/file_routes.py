"""Files out of repos: trees, and downloads whole or in part."""

import hashlib
import re
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response

from .errors import HubError
from .history import Commit
from .routing import Call, parse_json, read_body, route, stream_route
from .tree import Entry, Tree

_ENTRIES_A_PAGE = 1000
_MAX_PATHS_BYTES = 4 << 20
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
# Pictures of cards are shown by browsers; everything else is only ever downloaded.
_SHOWN = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}


class _LargeFile(FileResponse):
    chunk_size = 1 << 20


@route("GET", "{prefix}/{repo}/resolve/{revision}/{path}")
def download(call: Call) -> Response:
    """A file, with the headers by which clients cache it; ranges of it for those who go on after a cut."""
    storage, path = call.hub.storage, call.arguments["path"]
    repo = storage.repos.find(call.repo_id, call.caller)
    commit, tree = storage.history.at(repo.key, call.arguments["revision"])
    entry = tree.get(path)
    if entry is None:  # the commit lets clients remember that there is no such file
        raise HubError(404, f"Entry not found: {path[:200]}", "EntryNotFound", {"X-Repo-Commit": commit.id})
    headers = _file_headers(path, entry, commit.id)
    asked = call.request.headers.get("range")
    if call.request.method == "GET" and path in tree.counted and (asked is None or asked.startswith("bytes=0-")):
        storage.repos.count_download(repo)
    data = storage.history.content(entry.sha256)
    if data is not None:
        return _small_file(data, headers, asked)
    file = storage.files.path(entry.sha256)
    return _LargeFile(file, headers=headers, media_type=headers["Content-Type"], stat_result=file.stat())


def _file_headers(path: str, entry: Entry, commit: str) -> dict[str, str]:
    name = path.rsplit("/", 1)[-1]
    media_type = next((kind for end, kind in _SHOWN.items() if name.lower().endswith(end)), "application/octet-stream")
    disposition = "attachment" if media_type == "application/octet-stream" else "inline"
    headers = {
        "X-Repo-Commit": commit,
        "ETag": f'"{entry.etag}"',
        "Cache-Control": "no-cache",
        "Accept-Ranges": "bytes",
        "Content-Type": media_type,
        "Content-Disposition": f"{disposition}; filename*=UTF-8''{quote(name)}",
    }
    if entry.is_lfs:
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.etag}"'}
    return headers


def _small_file(data: bytes, headers: dict[str, str], asked: str | None) -> Response:
    match = _RANGE.fullmatch(asked or "")
    if match is None or match.groups() == ("", ""):
        return Response(data, headers=headers)
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        raise HubError(416, "The file has no such range.", headers={"Content-Range": f"bytes */{len(data)}"})
    headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
    return Response(data[start:stop], status_code=206, headers=headers)


@route("GET", "/api/{type}/{repo}/tree/{revision}")
def tree(call: Call) -> Response:
    return _tree(call, "")


@route("GET", "/api/{type}/{repo}/tree/{revision}/{path}")
def tree_of_folder(call: Call) -> Response:
    return _tree(call, call.arguments["path"].rstrip("/") + "/")


def _tree(call: Call, folder: str) -> Response:
    commit, files = _at(call)
    recursive = call.flag("recursive")
    paths = [
        path
        for path in (*files.folders, *files)
        if path.startswith(folder) and (recursive or "/" not in path[len(folder) :])
    ]
    if folder and not paths:
        raise HubError(404, f"{folder[:200]} does not exist on this revision.", "EntryNotFound")
    start = call.number("cursor", 0, 10**9)
    headers = {"X-Repo-Commit": commit.id}
    if start + _ENTRIES_A_PAGE < len(paths):
        # The next page is of the same commit, wherever the branch is by then.
        repo = f"{call.arguments['type']}/{call.repo_id}"
        address = f"{call.base}/api/{repo}/tree/{commit.id}/{quote(folder.rstrip('/'))}".rstrip("/")
        query = urlencode({"recursive": str(recursive).lower(), "cursor": start + _ENTRIES_A_PAGE})
        headers["Link"] = f'<{address}?{query}>; rel="next"'
    return JSONResponse(_told(files, paths[start : start + _ENTRIES_A_PAGE]), headers=headers)


@stream_route("POST", "/api/{type}/{repo}/paths-info/{revision}")
async def paths_info(call: Call) -> Response:
    """What some paths are; those that are nothing are left out. The body is a form or JSON."""
    body = await read_body(call.request, _MAX_PATHS_BYTES)
    if "json" in call.request.headers.get("content-type", ""):
        call.body = parse_json(body)
        paths = call.field("paths", list)
    else:
        paths = parse_qs(body.decode("utf-8", "replace"), max_num_fields=10_000).get("paths", [])
    return await run_in_threadpool(_paths_info, call, [str(path).strip("/") for path in paths])


def _paths_info(call: Call, paths: list[str]) -> Response:
    _, files = _at(call)
    return JSONResponse(_told(files, [path for path in paths if path in files or path in files.folders]))


def _at(call: Call) -> tuple[Commit, Tree]:
    """The commit and the files that a call is about."""
    repo = call.hub.storage.repos.find(call.repo_id, call.caller)
    return call.hub.storage.history.at(repo.key, call.arguments["revision"])


def _told(files: Tree, paths: list[str]) -> list[dict[str, Any]]:
    return [_file(path, files[path]) if path in files else _folder(path) for path in paths]


def _file(path: str, entry: Entry) -> dict[str, Any]:
    return {"type": "file", "oid": entry.oid, "size": entry.size, "path": path, **entry.lfs("oid")}


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha256(path.encode()).hexdigest()[:40], "size": 0, "path": path}
