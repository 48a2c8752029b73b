"""Files out of repos: trees, and downloads whole or in part."""

import hashlib
import re
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response

from .errors import HubError
from .history import ADAPTER_CONFIG, Entry, Tree, folders_of, lfs_pointer
from .repos import Repo
from .routing import Call, parse_json, read_body, route, stream_route

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
    commit = storage.history.resolve(repo.key, call.arguments["revision"])
    tree = storage.history.tree(repo.key, commit)
    entry = tree.get(path)
    if entry is None:  # the commit lets clients remember that there is no such file
        raise HubError(404, f"Entry not found: {path[:200]}", "EntryNotFound", {"X-Repo-Commit": commit})
    headers = _file_headers(path, entry, commit)
    asked = call.request.headers.get("range")
    if call.request.method == "GET" and _counts(path, tree) and (asked is None or asked.startswith("bytes=0-")):
        storage.repos.count_download(repo)
    data = storage.history.content(entry.sha256)
    if data is not None:
        return _small_file(data, headers, asked)
    file = storage.files.path(entry.sha256)
    return _LargeFile(file, headers=headers, media_type=headers["Content-Type"], stat_result=file.stat())


def _counts(path: str, tree: Tree) -> bool:
    """Whether to fetch this file is to fetch the repo: the config is, that every library asks for, or what stands for
    it in a repo without one."""
    names = {name.rsplit("/", 1)[-1] for name in tree}
    wanted = next((name for name in (ADAPTER_CONFIG, "config.json") if name in names), None)
    return path.rsplit("/", 1)[-1] == wanted if wanted else path == max(tree, key=lambda name: tree[name].size)


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
    repo, commit, files = _at(call)
    inside = {path: entry for path, entry in sorted(files.items()) if path.startswith(folder)}
    if folder and not inside:
        raise HubError(404, f"{folder[:200]} does not exist on this revision.", "EntryNotFound")
    recursive = call.flag("recursive")
    folders = {name for path in inside for name in folders_of(path) if len(name) >= len(folder)}
    told = [
        *(_folder(name) for name in sorted(folders) if recursive or "/" not in name[len(folder) :]),
        *(_file(path, entry) for path, entry in inside.items() if recursive or "/" not in path[len(folder) :]),
    ]
    start = call.number("cursor", 0, 10**9)
    headers = {"X-Repo-Commit": commit}
    if start + _ENTRIES_A_PAGE < len(told):
        # The next page is of the same commit, wherever the branch is by then.
        address = f"{call.base}/api/{repo.id.type}/{repo.id}/tree/{commit}/{quote(folder.rstrip('/'))}".rstrip("/")
        query = urlencode({"recursive": str(recursive).lower(), "cursor": start + _ENTRIES_A_PAGE})
        headers["Link"] = f'<{address}?{query}>; rel="next"'
    return JSONResponse(told[start : start + _ENTRIES_A_PAGE], headers=headers)


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
    _, _, files = _at(call)
    folders = {folder for path in files for folder in folders_of(path)}
    told = [
        _file(path, files[path]) if path in files else _folder(path) for path in paths if path in {*files, *folders}
    ]
    return JSONResponse(told)


def _at(call: Call) -> tuple[Repo, str, Tree]:
    """The repo, the commit and the files that a call is about."""
    repo = call.hub.storage.repos.find(call.repo_id, call.caller)
    commit = call.hub.storage.history.resolve(repo.key, call.arguments["revision"])
    return repo, commit, call.hub.storage.history.tree(repo.key, commit)


def _file(path: str, entry: Entry) -> dict[str, Any]:
    told: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.is_lfs:
        pointer = len(lfs_pointer(entry.sha256, entry.size))
        told["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer}
    return told


def _folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": hashlib.sha256(path.encode()).hexdigest()[:40], "size": 0, "path": path}
