"""Branches, tags and history."""

from starlette.responses import JSONResponse, Response

from .repos import Repo
from .routing import Call, route

_COMMITS_A_PAGE = 500


@route("GET", "/api/{type}/{repo}/refs")
def refs(call: Call) -> Response:
    repo = call.hub.storage.repos.find(call.repo_id, call.caller)
    found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
    for reference, commit in call.hub.storage.history.refs(repo.key).items():
        _, kind, name = reference.split("/", 2)
        group = found["tags" if kind == "tags" else "branches"]
        group.append({"name": name, "ref": reference, "targetCommit": commit})
    return JSONResponse(found)


@route("GET", "/api/{type}/{repo}/commits/{revision}")
def commits(call: Call) -> Response:
    repo = call.hub.storage.repos.find(call.repo_id, call.caller)
    history, page = call.hub.storage.history, call.number("p", 0, 10**6)
    newest = history.resolve(repo.key, call.arguments["revision"])
    found = history.log(repo.key, newest, skip=page * _COMMITS_A_PAGE, limit=_COMMITS_A_PAGE)
    told = [
        {
            "id": commit.id,
            "title": commit.title,
            "message": commit.message,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in found
    ]
    headers = {}
    if len(found) == _COMMITS_A_PAGE:
        address = f"{call.base}/api/{repo.id.type}/{repo.id}/commits/{newest}"
        headers["Link"] = f'<{address}?p={page + 1}>; rel="next"'
    return JSONResponse(told, headers=headers)


@route("POST", "/api/{type}/{repo}/branch/{name}")
def create_branch(call: Call) -> Response:
    start = (call.body or {}).get("startingPoint") if isinstance(call.body, dict | None) else None
    reference = f"refs/heads/{call.arguments['name']}"
    call.hub.storage.history.add_ref(_own(call).key, reference, str(start or "main"))
    return JSONResponse({})


@route("DELETE", "/api/{type}/{repo}/branch/{name}")
def delete_branch(call: Call) -> Response:
    call.hub.storage.history.remove_ref(_own(call).key, f"refs/heads/{call.arguments['name']}")
    return JSONResponse({})


@route("POST", "/api/{type}/{repo}/tag/{revision}")
def create_tag(call: Call) -> Response:
    reference = f"refs/tags/{call.field('tag')}"
    call.hub.storage.history.add_ref(_own(call).key, reference, call.arguments["revision"])
    return JSONResponse({})


@route("DELETE", "/api/{type}/{repo}/tag/{name}")
def delete_tag(call: Call) -> Response:
    call.hub.storage.history.remove_ref(_own(call).key, f"refs/tags/{call.arguments['name']}")
    return JSONResponse({})


@route("POST", "/api/{type}/{repo}/super-squash/{branch}")
def squash(call: Call) -> Response:
    title = (call.body or {}).get("message") if isinstance(call.body, dict | None) else None
    author = call.caller.require_user()
    title = str(title or f"Super-squash branch '{call.arguments['branch']}'")
    call.hub.storage.history.squash(_own(call).key, call.arguments["branch"], title, author)
    return JSONResponse({})


def _own(call: Call) -> Repo:
    return call.hub.storage.repos.find_for_writing(call.repo_id, call.caller)
