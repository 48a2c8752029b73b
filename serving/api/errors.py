"""Every refusal in the shape that OpenAI's clients read, with a stable code."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...support.errors import did_you_mean
from ..errors import ServingError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_HTTP_CODES = {404: "route_not_found", 405: "method_not_allowed", 400: "invalid_json"}
_MAX_SHOWN, _MANY, _MOST_FAULTS = 120, 200, 8

UNSUPPORTED = frozenset(
    (
        *("audio", "best_of", "dimensions", "echo", "function_call", "functions", "metadata", "modalities"),
        *("parallel_tool_calls", "prediction", "reasoning_effort", "service_tier", "store", "suffix", "tool_choice"),
        *("tools", "verbosity", "web_search_options"),
    )
)
"""Parameters of OpenAI's API that change an answer in ways this server does not have."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """An error as OpenAI's API writes it."""

    error: ErrorDetail


def error_response(
    code: str, message: str, status: int, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """One error as JSON, in plain ASCII: what a client sent may hold halves of characters."""
    return Response(json.dumps(error_body(code, message, status, param)), status, headers, "application/json")


def error_body(code: str, message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def shown(value: object) -> str:
    """A value from outside as messages repeat it: quoted, and never long."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}... ({len(str(value))} characters)"


def nearest(name: str, known: Collection[str]) -> str:
    """What a name that is not served could have been meant to be; where very many are, where to look them up."""
    if len(known) > _MANY:
        return f"GET /v1/models lists the {len(known)} that are"
    return did_you_mean(name[:_MAX_SHOWN], known)


def add_error_handlers(app: FastAPI) -> None:
    """Answer everything that a route raises on purpose, and every request that fits no route."""

    @app.exception_handler(ServingError)
    async def refused(request: Request, error: ServingError) -> Response:
        request.state.error_code = error.code
        return error_response(error.code, error.message, error.status, headers=_retry(request, error.status))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        code, message, param = describe(error.errors(), _body_model(request))
        request.state.error_code = code
        return error_response(code, message, 415 if code == "unsupported_media_type" else 400, param=param)

    @app.exception_handler(HTTPException)
    async def refused_by_route(request: Request, error: HTTPException) -> Response:
        code = request.state.error_code = _HTTP_CODES.get(error.status_code, "invalid_request")
        return error_response(code, _http_message(request, error), error.status_code, headers=error.headers)


def describe(faults: Sequence[Any], model: type[BaseModel] | None) -> tuple[str, str, str | None]:
    """Code, message and parameter of what is wrong with a request, the first fault deciding the code."""
    told = [_fault(fault, model) for fault in faults[:_MOST_FAULTS]]
    code, _, param = told[0]
    return code, "; ".join(dict.fromkeys(message for _, message, _ in told)), param


def _fault(fault: Any, model: type[BaseModel] | None) -> tuple[str, str, str | None]:
    place = [str(part) for part in fault["loc"][1:]]
    if fault["type"] == "json_invalid":
        return "invalid_json", f"the body is not JSON: {fault['ctx']['error']} at character {fault['loc'][1]}", None
    if not place:
        return _whole_body(fault)
    name = ".".join(place)[:_MAX_SHOWN]
    if fault["type"] == "extra_forbidden":
        return _unknown(place, name, model)
    if fault["type"] == "missing":
        return "missing_parameter", f"{name}: this parameter is required", name
    message = fault["msg"].removeprefix("Value error, ")
    value = fault.get("input")
    got = f" (got {shown(value)})" if isinstance(value, str | int | float | bool) else ""
    return "invalid_parameter", f"{name}: {message}{got}", name


def _whole_body(fault: Any) -> tuple[str, str, str | None]:
    if fault["type"] == "missing":
        return "invalid_json", "the body is empty; send a JSON object", None
    if isinstance(fault.get("input"), bytes):
        return "unsupported_media_type", "send JSON, with the header Content-Type: application/json", None
    return "invalid_json", f"the body is not a JSON object: {fault['msg']}", None


def _unknown(place: list[str], name: str, model: type[BaseModel] | None) -> tuple[str, str, str | None]:
    if len(place) == 1 and place[0] in UNSUPPORTED:
        return "unsupported_parameter", f"{name}: this server does not have this parameter; leave it out", name
    near = did_you_mean(place[-1][:_MAX_SHOWN], fields_at(model, place[:-1]))
    return "unknown_parameter", f"{name}: unknown parameter; {near}", name


def fields_at(model: Any, place: Sequence[str]) -> list[str]:
    """Names of the fields of the model that a path of fields leads to."""
    for step in place:
        field = getattr(model, "model_fields", {}).get(step)
        model = _model_in(field.annotation) if field is not None else model
    return list(getattr(model, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def _body_model(request: Request) -> type[BaseModel] | None:
    field = getattr(request.scope.get("route"), "body_field", None)
    return _model_in(field.field_info.annotation) if field is not None else None


def _http_message(request: Request, error: HTTPException) -> str:
    if error.status_code == 404:
        return f"there is no route {request.method} {shown(request.url.path)}; GET /openapi.json lists them all"
    if error.status_code == 400:
        return "the body cannot be read as JSON in UTF-8"
    return str(error.detail)


def _retry(request: Request, status: int) -> dict[str, str] | None:
    return {"Retry-After": str(request.app.state.service.admission.retry_after())} if status in (429, 503) else None
