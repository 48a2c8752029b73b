"""The catalogue: a page over the hub's own API, without a build step and without anything from elsewhere."""

from functools import cache
from importlib.resources import files
from itertools import islice
from typing import Any

from starlette.responses import JSONResponse, Response

from .card import render_card
from .history import CARD
from .metadata import results
from .repo_routes import summary
from .routing import Call, route

_BASE = "base_model:adapter:"
FACETS = {"base": _BASE, "task": "task:", "method": "loramux:"}
_FILES_SHOWN = 1000
_MEDIA_TYPES = {"hub.css": "text/css", "hub.js": "text/javascript"}
# Scripts and styles are ours; pictures are files of the hub, or of `blob:` where a token had to be sent for them.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@route("GET", "/_page/{name}")
def asset(call: Call) -> Response:
    name = call.arguments["name"]
    if name == "facets":
        return _facets(call)
    if name not in _MEDIA_TYPES:
        return JSONResponse({"error": "no such file"}, status_code=404)
    headers = {"Cache-Control": "no-cache"}
    return Response(_packaged(name), media_type=_MEDIA_TYPES[name], headers=headers)


def _facets(call: Call) -> Response:
    """Bases, tasks and methods of the repos that the caller sees, with how many have each."""
    repos = call.hub.storage.repos
    counted = {name: repos.tag_counts(prefix, "models", call.caller) for name, prefix in FACETS.items()}
    return JSONResponse(
        {name: {tag[len(FACETS[name]) :]: count for tag, count in tags.items()} for name, tags in counted.items()}
    )


@route("GET", "/_page/{type}/{repo}")
def card(call: Call) -> Response:
    """All that the page shows of a repo; its card as HTML that is safe to put into a page."""
    repo = call.hub.storage.repos.find(call.repo_id, call.caller)
    history = call.hub.storage.history
    tree = history.tree(repo.key, repo.head)
    text, adapter = history.text(tree.get(CARD)) or "", history.first_adapter(tree)
    told: dict[str, Any] = {
        **summary(repo),
        "base": next((tag[len(_BASE) :] for tag in repo.tags if tag.startswith(_BASE)), None),
        "rank": repo.facts.get("config", {}).get("peft", {}).get("r"),
        "folder": adapter and adapter[0],
        "results": results(repo.card or {}),
        "size": sum(entry.size for entry in tree.values()),
        "files": [{"path": path, "size": entry.size} for path, entry in islice(tree.items(), _FILES_SHOWN)],
        "card": render_card(text, f"{call.request.scope.get('root_path', '')}{repo.id.page}/resolve/main/"),
    }
    return JSONResponse(told)


@route("GET", "/favicon.ico")
def icon(call: Call) -> Response:
    return Response(status_code=204)


@route("GET", "/")
def home(call: Call) -> Response:
    return _page(call)


@route("GET", "/_compare")
def compare(call: Call) -> Response:
    return _page(call)


@route("GET", "/{page}")
def repo_page(call: Call) -> Response:
    """The address that clients print for a repo, and those below it."""
    return _page(call)


def _page(call: Call) -> Response:
    html = _packaged("index.html").replace("{root}", f"{call.request.scope.get('root_path', '')}/")
    return Response(html, media_type="text/html", headers={"Content-Security-Policy": _POLICY})


@cache
def _packaged(name: str) -> str:
    return (files(__package__) / "page" / name).read_text(encoding="utf-8")
