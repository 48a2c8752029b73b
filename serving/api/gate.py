"""What every request passes before its route: an id and a line in the log, its key, and limits on its body."""

import asyncio
import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import ServingError
from .errors import error_response
from .service import Service

log = logging.getLogger("loramux.serving")

PUBLIC = ("/", "/health", "/ready", "/openapi.json")
PAGE = "/page/"
ADMIN = ("/v1/lora_adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_PORT = re.compile(r":\d+$")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_LINGER_BYTES, _LINGER_S = 8, 5.0
_GONE = 499


class Gate:
    """Names, times and logs every request, and answers what was raised before or beside a route."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        state = scope.setdefault("state", {})
        state["request_id"] = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        visit = _Visit(scope, send)
        try:
            self._check_key(scope, headers)
            body = await _Body(receive, headers, self.service).read()
            await self.app(scope, body, visit.send)
        except ServingError as error:
            state["error_code"] = error.code
            wanted = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            refusal = error_response(error.code, error.message, error.status, headers=wanted)
            await refusal(scope, receive, visit.send)
        except _Gone:
            visit.status = _GONE
        except Exception:
            log.exception("internal error", extra={"request_id": state["request_id"]})
            message = f"internal error; the log has more under request id {state['request_id']}"
            state["error_code"] = "internal_error"
            if visit.status is None:
                await error_response("internal_error", message, 500)(scope, receive, visit.send)
        finally:
            self._note(scope, visit)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        path, keys = get_route_path(scope), self.service.keys  # what the routes are found by, also below a prefix
        if path in PUBLIC or path.startswith(PAGE):
            return
        authorization = headers.get("authorization")
        if path.startswith(ADMIN) and scope["method"] not in ("GET", "HEAD"):
            keys.check_admin(authorization)
        else:
            keys.check_client(authorization)

    def _note(self, scope: Scope, visit: "_Visit") -> None:
        route = getattr(scope.get("route"), "path", None) or "none"
        seconds = time.monotonic() - visit.began
        state = scope["state"]
        self.service.metrics.note_http(route, visit.status or 0, seconds)
        client = scope.get("client")
        extra: dict[str, Any] = {
            "request_id": state["request_id"],
            "method": scope["method"],
            "path": scope["path"][:256],
            "status": visit.status,
            "ms": round(1000 * seconds, 1),
            "client": client[0] if client else None,
            **state.get("told", {}),
        }
        if "error_code" in state:
            extra["code"] = state["error_code"]
        log.info("request", extra=extra)


class ThisMachineOnly:
    """Refuses requests for other hosts' names: else a web page could have its own name point here, and be let in."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self.app = app
        self._names = ("localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = Headers(scope=scope).get("host", "")
            if _PORT.sub("", given) not in self._names:
                message = "without API keys the server answers this machine alone, by its own name; set keys, or anyone"
                await error_response("host_forbidden", message, 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class _Visit:
    """Watches what is sent."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self.began = time.monotonic()
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self._scope["state"]["request_id"]
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Content-Security-Policy"] = _POLICY
            headers.setdefault("Cache-Control", "no-store")
        await self._send(message)


class _Gone(Exception):
    """The client left before its request was whole."""


class _Body:
    """Reads a request's body before its route sees it: whole, in time, and within the limit."""

    def __init__(self, receive: Receive, headers: Headers, service: Service) -> None:
        self._receive, self._limits = receive, service.config.limits
        self._declared = headers.get("content-length", "0")

    async def read(self) -> Receive:
        """The body as one message; what comes after it (the client leaving) passes through.

        Raises:
            ServingError: 413 where it is too large, 408 where it does not arrive.
            _Gone: the client left.
        """
        try:
            body = await asyncio.wait_for(self._read(), self._limits.body_s)
        except TimeoutError:
            raise ServingError(
                "body_timeout", f"the request did not arrive whole within {self._limits.body_s:g} s", 408
            ) from None
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return waiting.pop() if waiting else await self._receive()

        return receive

    async def _read(self) -> bytes:
        limit = self._limits.body_bytes
        if int(self._declared) > limit:  # the server below us has checked that it is a number
            await self._refuse(0, more=True)
        parts: list[bytes] = []
        size = 0
        while True:
            part, more = await self._part()
            size += len(part)
            if size > limit:
                await self._refuse(size, more)
            parts.append(part)
            if not more:
                return b"".join(parts)

    async def _part(self) -> tuple[bytes, bool]:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        return message.get("body", b""), message.get("more_body", False)

    async def _refuse(self, size: int, more: bool) -> None:
        """Let the client finish sending, within bounds: one that still sends does not read the answer."""
        limit = self._limits.body_bytes
        until = time.monotonic() + _LINGER_S
        while more and size < _LINGER_BYTES * limit and time.monotonic() < until:
            part, more = await self._part()
            size += len(part)
        raise ServingError("body_too_large", f"the body is larger than {limit} bytes", 413)


class JsonLines(logging.Formatter):
    """Every record as one line of JSON."""

    _PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in self._PLAIN},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
