"""The hub as an ASGI application."""

import asyncio
import contextlib
import logging
import re
from typing import Any

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from ...support.config import config
from . import account_routes, file_routes, page_routes, ref_routes, repo_routes, upload_routes, xet_routes
from .accounts import ANYBODY, NOBODY, Caller
from .errors import HubError, disk_full, is_disk_full
from .links import Links
from .routing import Call, answer, find_route
from .storage import Storage
from .xet import XetUploads

ROUTE_MODULES = (account_routes, repo_routes, ref_routes, file_routes, upload_routes, xet_routes, page_routes)
_LOG = logging.getLogger("loramux.hub")
_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")
_SWEEP_EVERY_S = 300
_DRAIN_BYTES = 64 << 20
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
}


@config
class Policy:
    """What a hub takes, and how.

    Attributes:
        inline_bytes: files up to this size come inside the commit and live in the database; clients send larger ones
            by Xet or LFS, as they can.
        part_bytes: LFS uploads larger than this are sent in parts of this size.
        max_file_bytes: the largest file.
        link_seconds: how long an upload link and a Xet token are valid; also how long an upload may pause.
    """

    inline_bytes: int = Field(default=1 << 20, ge=0, le=8 << 20)
    part_bytes: int = Field(default=1 << 30, ge=1 << 16)
    max_file_bytes: int = Field(default=64 << 30, ge=1)
    link_seconds: int = Field(default=6 * 3600, ge=1)


class Hub:
    """A Hub over a storage, for any ASGI server; also mounted under a path of another application."""

    def __init__(self, storage: Storage, policy: Policy | None = None) -> None:
        storage.lock()
        self.storage, self.policy = storage, policy or Policy()
        self.links = Links(storage.secret(), self.policy.link_seconds)
        self.xet = XetUploads(storage.root, storage.files, max_file_bytes=self.policy.max_file_bytes)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        request = Request(scope, receive)
        response = await self._respond(request)
        for name, value in _SAFE.items():
            response.headers.setdefault(name, value)
        # A client that went away while it downloaded is none of our errors.
        with contextlib.suppress(ClientDisconnect):
            await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except HubError as error:
            refusal = error
        except Exception as error:
            if is_disk_full(error):
                refusal = disk_full()
            else:
                _LOG.exception("%s %s", request.method, request.url.path)
                refusal = HubError(500, f"The hub failed at this request ({type(error).__name__}); its log says more.")
        await _drain(request)
        return _refuse(refusal)

    async def _answer(self, request: Request) -> Response:
        scope = request.scope
        path = scope["raw_path"].decode("latin-1").split("?")[0].removeprefix(scope.get("root_path", ""))
        method = "GET" if request.method == "HEAD" else request.method
        route, arguments = find_route(method, path or "/")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HubError(415, "Compressed bodies are not taken: send it without Content-Encoding.")
        _refuse_other_sites(request, method)
        accounts = self.storage.accounts
        caller = NOBODY if route.has_own_rights else await run_in_threadpool(accounts.caller, _token(request))
        _refuse_other_names(request, caller)
        return await answer(route, Call(self, request, caller, arguments))

    async def _live(self, receive: Any, send: Any) -> None:
        """Start, sweep up now and then what uploads left, stop."""
        await receive()
        sweeper = asyncio.create_task(self._sweep())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        sweeper.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_EVERY_S)
            for sweep in (self.storage.files.sweep, self.xet.sweep):
                with contextlib.suppress(OSError):  # what vanishes meanwhile was finished meanwhile
                    await run_in_threadpool(sweep, self.policy.link_seconds)


def _refuse_other_sites(request: Request, method: str) -> None:
    """A page of another site must not use the browser of somebody who can reach this hub."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if method != "GET" and origin not in (None, f"http://{host}", f"https://{host}"):
        raise HubError(403, f"A page of {str(origin)[:200]} may not change this hub.")


def _refuse_other_names(request: Request, caller: Caller) -> None:
    """Nor may it reach a hub that asks nobody who they are, by a name of its own that leads to this machine."""
    host = request.headers.get("host", "")
    if caller is ANYBODY and not _LOOPBACK.fullmatch(host):
        raise HubError(403, f"A hub without tokens answers on this machine only, not as {host[:200]!r}.")


def _token(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


async def _drain(request: Request) -> None:
    """Read what the client still sends, within bounds: otherwise it may never see why it was refused."""
    seen = 0
    with contextlib.suppress(ClientDisconnect, RuntimeError):
        async for part in request.stream():
            seen += len(part)
            if seen > _DRAIN_BYTES:
                return


def _refuse(error: HubError) -> Response:
    message = error.message.encode("ascii", "backslashreplace").decode()
    headers = {**error.headers, "X-Error-Message": "".join(char if char.isprintable() else " " for char in message)}
    if error.code:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message}, status_code=error.status, headers=headers)
