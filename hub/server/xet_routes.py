"""Large files by Xet, which newer clients use without asking whether a hub has it."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from .errors import disk_full, is_disk_full
from .files import Incoming
from .routing import Call, route, stream_route
from .upload_routes import receive
from .xet import MAX_SHARD, MAX_XORB

_CAS = "/_cas/{session}/v1"


@route("GET", "/api/{type}/{repo}/xet-write-token/{revision}")
def write_token(call: Call) -> Response:
    """A right to upload, and the address to do so.

    Each time it is another address: clients remember what they sent to an address, and would not send it again to a
    hub that has dropped it since.
    """
    call.hub.storage.repos.find_for_writing(call.repo_id, call.caller)
    user = call.caller.require_user()
    token, expires = call.hub.links.token(user)
    address = f"{call.base}/_cas/{call.hub.links.session(user)}"
    headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return JSONResponse({"casUrl": address, "accessToken": token, "exp": expires}, headers=headers)


@stream_route("POST", _CAS + "/xorbs/default/{xorb}", has_own_rights=True)
async def put_xorb(call: Call) -> Response:
    _check_token(call)
    with _no_retries(), call.hub.storage.files.receive() as incoming:
        await receive(call.request, incoming, MAX_XORB)
        session, name = call.arguments["session"], call.arguments["xorb"]
        is_new = await run_in_threadpool(call.hub.xet.add_xorb, session, name, incoming)
    return JSONResponse({"was_inserted": is_new})


@stream_route("POST", _CAS + "/shards", has_own_rights=True)
async def put_shard(call: Call) -> Response:
    user = _check_token(call)
    with _no_retries(), call.hub.storage.files.receive() as incoming:
        await receive(call.request, incoming, MAX_SHARD)
        await run_in_threadpool(_ingest, call, incoming, user)
    return JSONResponse({"result": 1})


@contextmanager
def _no_retries() -> Iterator[None]:
    """Tell of a full disk by 413: Xet clients try again for minutes after any 5xx, and say nothing meanwhile."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise disk_full(413) if is_disk_full(error) else error from None


def _ingest(call: Call, shard: Incoming, user: str) -> None:
    history = call.hub.storage.history
    for sha256 in call.hub.xet.ingest(call.arguments["session"], shard, partial(history.was_sent_by, user=user)):
        history.record_upload(sha256, user)


def _check_token(call: Call) -> str:
    """The user whose upload this is; a token is good for the sessions of its user only."""
    user = call.hub.links.check_token(call.request.headers.get("authorization", "").removeprefix("Bearer "))
    call.hub.links.check_session(call.arguments["session"], user)
    return user
