"""Repos: create, delete, move, change, list, tell."""

import hashlib
from typing import Any
from urllib.parse import urlencode

from starlette.responses import JSONResponse, Response

from .errors import HubError
from .metadata import CardError, card_metadata
from .names import RepoId, repo_id
from .repos import MAX_PAGE, Query, Repo
from .routing import Call, route
from .tree import Tree

_VISIBILITIES = (("visibility", "private"), ("visibility", "public"), ("private", True), ("private", False))
_FILTERS = ("filter", "other", "library", "pipeline_tag", "language")


@route("POST", "/api/repos/create")
def create(call: Call) -> Response:
    repo = _named(call)
    author = call.caller.require_writer(repo.namespace)
    private = bool(_wants_private(call.body))
    url = f"{call.base}{repo.page}"
    try:
        call.hub.storage.repos.create(repo, private=private, author=author)
    except HubError as error:
        if error.status != 409:
            raise
        # Clients take the address from here too, when a repo may be there already.
        return JSONResponse({"error": error.message, "url": url}, status_code=409)
    return JSONResponse({"url": url, "name": str(repo), "id": str(repo)})


@route("DELETE", "/api/repos/delete")
def delete(call: Call) -> Response:
    repo = call.hub.storage.repos.find_for_writing(_named(call), call.caller)
    call.hub.storage.repos.delete(repo.id)
    return JSONResponse({})


@route("POST", "/api/repos/move")
def move(call: Call) -> Response:
    type_ = f"{call.body.get('type') or 'model'}s" if isinstance(call.body, dict) else ""
    repos = call.hub.storage.repos
    source = repos.find_for_writing(repo_id(type_, call.field("fromRepo")), call.caller)
    target = repo_id(type_, call.field("toRepo"))
    call.caller.require_writer(target.namespace)
    repos.move(source, target)
    return JSONResponse({})


@route("PUT", "/api/{type}/{repo}/settings")
def settings(call: Call) -> Response:
    repo = call.hub.storage.repos.find_for_writing(call.repo_id, call.caller)
    settings = call.body if isinstance(call.body, dict) else {}
    if unknown := sorted(settings.keys() - {"visibility", "private"}):
        raise HubError(400, f"A repo of this hub can be made private or public; it has no setting {unknown[:5]}.")
    private = _wants_private(settings)
    if private is None:
        raise HubError(400, "A repo of this hub is private or public: say which.")
    call.hub.storage.repos.set_private(repo, private)
    return JSONResponse({})


def _wants_private(body: dict[str, Any]) -> bool | None:
    """Whether the body asks for a private repo; None where it does not say.

    Raises:
        HubError: 400, it does not say so plainly.
    """
    asked = [(name, body[name]) for name in ("visibility", "private") if body.get(name) is not None]
    if not asked:
        return None
    if len(asked) > 1 or not any(asked[0] == known for known in _VISIBILITIES):
        raise HubError(400, f"A repo of this hub is private or public, not {str(dict(asked))[:100]}.")
    return asked[0][1] in ("private", True)


def _named(call: Call) -> RepoId:
    """The repo that the body names, in the caller's own namespace unless it says another."""
    name = call.field("name")
    namespace = call.body.get("organization") or call.caller.require_user()
    return repo_id(f"{call.body.get('type') or 'model'}s", f"{namespace}/{name}")


@route("POST", "/api/validate-yaml")
def validate_card(call: Call) -> Response:
    try:
        card_metadata(call.field("content"))
    except CardError as error:
        return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, status_code=400)
    return JSONResponse({"errors": [], "warnings": []})


@route("GET", "/api/{type}")
def listing(call: Call) -> Response:
    given = call.request.query_params
    full = any(call.flag(name) for name in ("full", "cardData", "config")) or "expand" in given
    query = Query(
        type=call.arguments["type"],
        tags=[tag for name in _FILTERS for value in given.getlist(name) for tag in value.split(",")],
        author=given.get("author"),
        name=given.get("search"),
        words=given.get("words", "").split()[:10],
        sort=given.get("sort", "lastModified"),
        limit=max(call.number("limit", MAX_PAGE, MAX_PAGE), 1),
        after=given.get("cursor"),
        with_details=full,
    )
    page = call.hub.storage.repos.list(query, call.caller)
    headers = {}
    if page.next is not None:
        rest = [(name, value) for name, value in given.multi_items() if name != "cursor"]
        headers["Link"] = f'<{call.base}/api/{query.type}?{urlencode([*rest, ("cursor", page.next)])}>; rel="next"'
    return JSONResponse([summary(repo) for repo in page.repos], headers=headers)


@route("GET", "/api/{type}/{repo}")
def info(call: Call) -> Response:
    return _info(call, "main")


@route("GET", "/api/{type}/{repo}/revision/{revision}")
def info_at(call: Call) -> Response:
    return _info(call, call.arguments["revision"])


@route("GET", "/api/{type}/{repo}/auth-check")
def check_access(call: Call) -> Response:
    call.hub.storage.repos.find(call.repo_id, call.caller)
    return JSONResponse({})


def _info(call: Call, revision: str) -> Response:
    repo = call.hub.storage.repos.find(call.repo_id, call.caller)
    commit, tree = call.hub.storage.history.at(repo.key, revision)
    return JSONResponse(
        {
            **summary(repo),
            "sha": commit.id,
            "lastModified": commit.date,
            "siblings": _siblings(tree, with_sizes=call.flag("blobs")),
            "usedStorage": sum(entry.size for entry in tree.values()),
        }
    )


def summary(repo: Repo) -> dict[str, Any]:
    """What lists and clients know of a repo."""
    told = {
        "_id": hashlib.sha256(f"{repo.id.type}/{repo.key}".encode()).hexdigest()[:24],
        "id": str(repo.id),
        "modelId": str(repo.id),
        "author": repo.id.namespace,
        "sha": repo.head,
        "createdAt": repo.created,
        "lastModified": repo.modified,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": repo.downloads,
        "likes": 0,
        "tags": repo.tags,
        **repo.facts,
    }
    if repo.paths is not None:
        told["siblings"] = [{"rfilename": path} for path in sorted(repo.paths)]
    if repo.card:
        told["cardData"] = repo.card
        told["model-index"] = repo.card.get("model-index")
    return told


def _siblings(tree: Tree, *, with_sizes: bool) -> list[dict[str, Any]]:
    siblings: list[dict[str, Any]] = []
    for path, entry in tree.items():
        sibling: dict[str, Any] = {"rfilename": path}
        if with_sizes:
            sibling |= {"size": entry.size, "blobId": entry.oid, **entry.lfs("sha256")}
        siblings.append(sibling)
    return siblings
