"""Who am I, and who is in an organisation."""

from starlette.responses import JSONResponse, Response

from .errors import HubError
from .routing import Call, route


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Response:
    caller = call.caller
    name = caller.require_user()
    organizations = [{"type": "org", "name": org, "fullname": org} for org in caller.organizations]
    access = {"displayName": name, "role": caller.role}
    return JSONResponse(
        {
            "type": "user",
            "id": name,
            "name": name,
            "fullname": name,
            "isPro": False,
            "orgs": organizations,
            "auth": {"type": "access_token", "accessToken": access},
        }
    )


@route("GET", "/api/organizations/{name}/members")
def members(call: Call) -> Response:
    organizations = {name.lower(): users for name, users in call.hub.storage.accounts.organizations().items()}
    users = organizations.get(call.arguments["name"].lower())
    if users is None or not call.caller.belongs_to(call.arguments["name"]):
        raise HubError(404, f"There is no organisation {call.arguments['name'][:100]!r} that you belong to.")
    return JSONResponse([{"user": user, "fullname": user, "avatarUrl": ""} for user in users])
