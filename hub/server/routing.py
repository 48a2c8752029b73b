"""How a request finds its function: by its raw path, since clients send revisions such as `refs%2Fpr%2F1` quoted."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from .accounts import Caller
from .errors import HubError
from .names import REPO_TYPES, RepoId, repo_id

if TYPE_CHECKING:
    from .app import Hub

_PARTS = {
    "type": "|".join(REPO_TYPES),
    "prefix": "/datasets|/spaces|",  # models have none
    "repo": "[^/]+/[^/]+",
    "path": ".+",
    "page": r"(?:(?:datasets|spaces)/)?(?!api/|_)[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(?:/(?:tree|commit)/.+)?",
    "sha256": "[0-9a-f]{64}",
    "xorb": "[0-9a-f]{64}",
    "number": "[0-9]{1,6}",
}
# Where clients look for a repo without a namespace, such as `gpt2`, which this hub has none of.
_OF_BARE_NAME = re.compile(
    rf"/api/({_PARTS['type']})/[^/]+(/(revision|tree|commits|paths-info)/.+)?|({_PARTS['prefix']})/[^/]+/resolve/.+"
)
_MAX_JSON_BYTES = 4 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass
class Call:
    """One request, as the functions that answer it see it.

    Attributes:
        arguments: the parts of the path that the route names, unquoted.
        body: the JSON body; None where there was none, and for routes that read the body themselves.
    """

    hub: "Hub"
    request: Request
    caller: Caller
    arguments: dict[str, str]
    body: Any = None

    @property
    def repo_id(self) -> RepoId:
        type_ = self.arguments.get("type") or self.arguments.get("prefix", "").strip("/") or "models"
        return repo_id(type_, self.arguments["repo"])

    @property
    def base(self) -> str:
        """The hub's own address, as this client knows it."""
        request = self.request
        host = request.headers.get("host", "localhost")
        return f"{request.url.scheme}://{host}{request.scope.get('root_path', '')}"

    def field(self, name: str, kind: type = str) -> Any:
        """A field of the JSON body.

        Raises:
            HubError: 400, it is missing or of another kind.
        """
        value = self.body.get(name) if isinstance(self.body, dict) else None
        if not isinstance(value, kind):
            raise HubError(400, f"The body must have {name!r}, a {kind.__name__}.")
        return value

    def flag(self, name: str) -> bool:
        return self.request.query_params.get(name, "").lower() in ("true", "1")

    def number(self, name: str, default: int, maximum: int) -> int:
        text = self.request.query_params.get(name, "")
        if not text:
            return default
        if not text.isdecimal() or len(text) > 9:
            raise HubError(400, f"{name}={text[:50]!r} is not a number.")
        return min(int(text), maximum)


Answer = Callable[[Call], Response]
StreamAnswer = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    method: str
    pattern: re.Pattern[str]
    answer: Answer | StreamAnswer
    streams: bool
    has_own_rights: bool


ROUTES: list[Route] = []


def route(method: str, path: str, *, has_own_rights: bool = False) -> Callable[[Answer], Answer]:
    """Register a function that answers; it runs in a thread, after the JSON body was read.

    Args:
        has_own_rights: the address itself is the right to use it, so nobody looks who calls.
    """

    def register(answer: Answer) -> Answer:
        ROUTES.append(Route(method, _compile(path), answer, False, has_own_rights))
        return answer

    return register


def stream_route(method: str, path: str, *, has_own_rights: bool = False) -> Callable[[StreamAnswer], StreamAnswer]:
    """As `route`, for a coroutine that reads the body itself."""

    def register(answer: StreamAnswer) -> StreamAnswer:
        ROUTES.append(Route(method, _compile(path), answer, True, has_own_rights))
        return answer

    return register


def _compile(path: str) -> re.Pattern[str]:
    literal = re.escape(path).replace(r"\{", "{").replace(r"\}", "}")
    return re.compile(re.sub(r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{_PARTS.get(part[1], '[^/]+')})", literal))


def find_route(method: str, raw_path: str) -> tuple[Route, dict[str, str]]:
    """The route of a raw path, with its unquoted arguments.

    Raises:
        HubError: 404 or 405, there is none; 400, the path is no UTF-8.
    """
    allowed: set[str] = set()
    for candidate in ROUTES:
        if match := candidate.pattern.fullmatch(raw_path):
            if method == candidate.method:
                return candidate, {name: _unquote(text) for name, text in match.groupdict().items()}
            allowed.add(candidate.method)
    if allowed:
        raise HubError(405, f"{method} is not possible here.", headers={"Allow": ", ".join(sorted(allowed))})
    code = "RepoNotFound" if _OF_BARE_NAME.fullmatch(raw_path) else None
    raise HubError(404, f"This hub has no such address: {raw_path[:200]}", code)


def _unquote(text: str) -> str:
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise HubError(400, f"{text[:200]!r} is not UTF-8.") from None


async def answer(route: Route, call: Call) -> Response:
    if route.streams:
        return await route.answer(call)  # type: ignore[misc]
    call.body = await read_json_body(call.request)
    return await run_in_threadpool(route.answer, call)  # type: ignore[arg-type]


async def read_json_body(request: Request) -> Any:
    """The body as JSON.

    Raises:
        HubError: 413, it is too large; 400, it is no JSON, or nested too deeply to be read.
    """
    data = await read_body(request, _MAX_JSON_BYTES)
    return parse_json(data) if data else None


async def read_body(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise HubError(413, f"The body is larger than the {limit} bytes that are allowed here.")
        parts.append(part)
    return b"".join(parts)


def parse_json(data: bytes) -> Any:
    try:
        value = json.loads(text := data.decode())
        if _SURROGATE.search(text):  # of a pair, or alone, which is no text that could be kept or sent
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise HubError(400, "The JSON is nested too deeply.") from None
    except ValueError as error:
        raise HubError(400, f"The body is not JSON: {error}") from None


async def read_lines(request: Request, max_line_bytes: int) -> AsyncIterator[bytes]:
    """The lines of a body, one at a time: it may be longer than what memory should hold.

    Raises:
        HubError: 413, a line is too long.
    """
    pending = bytearray()
    async for part in request.stream():
        pending += part
        *whole, rest = pending.split(b"\n") if b"\n" in part else [pending]
        if max(map(len, [*whole, rest])) > max_line_bytes:
            raise HubError(413, f"A line of the body is longer than the {max_line_bytes} bytes that are allowed.")
        for line in whole:
            yield bytes(line)
        pending = rest
    yield bytes(pending)
