"""What those who run the server look at: health, metrics, and the live page."""

from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Depends
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from ..errors import ServingError
from .service import Service, service_of

public, router = APIRouter(), APIRouter()
Served = Annotated[Service, Depends(service_of)]
_PAGE = {
    "page.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


@public.get("/health")
async def health(service: Served) -> Response:
    """Whether the server lives: 503 once its engine does not."""
    if not service.engine.is_alive:
        raise ServingError("engine_dead", "the engine has stopped; restart the server", 503)
    return JSONResponse({"status": "ok"})


@public.get("/ready")
async def ready(service: Served) -> Response:
    """Whether it takes requests: 503 while it shuts down."""
    if service.admission.is_draining:
        raise ServingError("shutting_down", "the server is shutting down", 503)
    return await health(service)


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: Served) -> Response:
    """What Prometheus reads."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/status")
async def status(service: Served) -> Response:
    """Load, adapters and what the automatic choice picked, for the live page."""
    now = {name: values[""] for name, (_, label, values) in service.gauges().items() if label is None}
    return JSONResponse(
        {
            "base": service.base,
            "has_chat_template": service.has_chat_template,
            "is_draining": service.admission.is_draining,
            "in_flight": service.admission.in_flight,
            "now": now,
            "traffic": service.metrics.traffic(),
        }
    )


@public.get("/", include_in_schema=False)
async def page() -> Response:
    """The live page."""
    return _page_file("page.html")


@public.get("/page/{name}", include_in_schema=False)
async def page_file(name: str) -> Response:
    """Its style and its script."""
    if name not in _PAGE:
        raise ServingError("route_not_found", f"the page consists of {', '.join(_PAGE)}", 404)
    return _page_file(name)


def _page_file(name: str) -> Response:
    return Response((files(__package__.rpartition(".")[0]) / "page" / name).read_bytes(), media_type=_PAGE[name])
